"""ViewLoader: the views of the recipes' loader, epoch by epoch, and the same images on any number of ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kilobatch import UserError, ViewLoader, Views
from tests.helpers import loaders
from tests.helpers.process_groups import run_ranks

VIEWS = Views(size=24)


def epochs(beton: str, seed: int, count: int) -> list[Tensor]:
    """(steps, V, n, 3, size, size) of each of the first epochs."""
    with ViewLoader(beton, 8, VIEWS, seed, "cpu") as loader:
        return [torch.stack(list(loader)) for _ in range(count)]


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("beton")
    return str(loaders.write(folder / "a.beton", [loaders.photo(i, 40, 30) for i in range(20)]))


def test_each_iteration_is_the_next_epoch(beton: str) -> None:
    first, second = epochs(beton, 5, 2)
    with loaders.loader(Path(beton), VIEWS) as loader:
        for epoch, mine in enumerate((first, second)):
            expected = torch.stack([batch.views[0].transpose(0, 1) for batch in loader.epoch(epoch)])
            assert torch.equal(mine, expected) and mine.shape == (2, 2, 8, 3, 24, 24)
    assert not torch.equal(first, second) and not torch.equal(first, epochs(beton, 6, 1)[0])


def test_an_epoch_by_its_number(beton: str) -> None:
    with ViewLoader(beton, 8, VIEWS, 5, "cpu") as loader:
        assert len(loader) == 2
        batch = next(iter(loader.epoch(1)))
        assert batch.label.tolist() == batch.index.tolist()  # each image is a class of its own
        one, two = next(iter(loader))
        assert one.shape == two.shape == (8, 3, 24, 24)
    assert not loaders.threads_of_loaders()


def test_several_groups_come_as_a_tuple(beton: str) -> None:
    groups = [VIEWS, Views(count=3, size=16)]
    with ViewLoader(beton, 8, groups, 5, "cpu") as loader, loaders.loader(Path(beton), groups) as same:
        for given, batch in zip(loader, same.epoch(0), strict=True):
            large, small = given
            assert large.shape == (2, 8, 3, 24, 24) and small.shape == (3, 8, 3, 16, 16)
            assert all(torch.equal(a, b.transpose(0, 1)) for a, b in zip(given, batch.views, strict=True))


def test_ranks_share_the_batch(beton: str) -> None:
    alone = epochs(beton, 5, 1)[0]
    ranks = run_ranks(2, epochs, beton, 5, 1)
    assert torch.equal(torch.cat([rank[0] for rank in ranks], 2), alone)


def test_a_batch_that_is_too_large(beton: str) -> None:
    with pytest.raises(UserError, match="fewer than one global batch of 64"):
        ViewLoader(beton, 64, VIEWS)
