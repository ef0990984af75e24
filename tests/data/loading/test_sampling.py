"""The order of samples, and its division into the batches and blocks of ranks."""

import hashlib

import numpy as np
import pytest

from kilobatch.data.loading.sampling import epoch_order, rank_batches, rank_block


def test_every_sample_comes_once():
    assert sorted(epoch_order(3, 1, 1000)) == list(range(1000))


def test_seeds_and_epochs_give_unrelated_orders():
    orders = [epoch_order(0, 0, 1000), epoch_order(0, 1, 1000), epoch_order(1, 0, 1000), epoch_order(1, 1, 1000)]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).mean() < 0.01
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.15


def test_the_order_is_the_same_on_every_machine_and_version():
    assert epoch_order(7, 2, 8).tolist() == [0, 3, 5, 1, 4, 2, 6, 7]
    assert hashlib.sha256(epoch_order(7, 2, 5000).tobytes()).hexdigest()[:16] == "49fbdf0ac1b2dce8"


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_together_take_the_global_batch_in_rank_order(world: int):
    shuffled = epoch_order(0, 0, 101)
    rows = np.concatenate([rank_batches(shuffled, 12, rank, world) for rank in range(world)], axis=1)
    assert (rows == shuffled[:96].reshape(8, 12)).all()


@pytest.mark.parametrize(("samples", "world"), [(10, 3), (7, 4), (2, 3), (12, 1)])
def test_blocks_are_contiguous_even_and_complete(samples: int, world: int):
    blocks = [rank_block(samples, rank, world) for rank in range(world)]
    assert np.concatenate(blocks).tolist() == list(range(samples))
    assert max(map(len, blocks)) - min(map(len, blocks)) <= 1
