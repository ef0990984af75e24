"""k-NN over ranks and tiles against brute force in float64."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from kilobatch.data.batch import make_batch
from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.method import Method
from kilobatch.trainer.evaluate import knn
from kilobatch.trainer.evaluate.features import Features, extract, gather_parts, gather_rows, representing
from kilobatch.trainer.evaluate.options import KNNOptions
from tests.helpers.in_memory_data import Block, clusters, flat, pixels
from tests.helpers.process_groups import run_ranks

CLASSES, K, TEMPERATURE = 5, 20, 0.07


def rows() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """103 bank rows and 41 queries, with their labels; the classes overlap."""
    bank, bank_label = clusters(103, CLASSES, seed=1, noise=6.0)
    queries, query_label = clusters(41, CLASSES, seed=2, noise=6.0)
    return flat(bank), bank_label, flat(queries), query_label


def brute_force() -> tuple[Tensor, Tensor, float]:
    """Neighbours, votes and accuracy by one float64 matrix and a plain loop."""
    bank, label, queries, truth = rows()
    similarity = normalize(queries.double(), dim=1) @ normalize(bank.double(), dim=1).T
    order = similarity.argsort(dim=1, descending=True)[:, :K]
    votes = torch.zeros(len(queries), CLASSES, dtype=torch.float64)
    for i in range(len(queries)):
        for j in order[i]:
            votes[i, label[j]] += torch.exp(similarity[i, j] / TEMPERATURE)
    voted = votes.argmax(dim=1)
    return order, voted, float((voted == truth).double().mean())


def searched(tile: int) -> tuple[Tensor, Tensor, float]:
    bank, label, queries, truth = rows()
    mine = torch.arange(len(bank)).tensor_split(collectives.world_size())[collectives.rank()]
    ours = torch.arange(len(queries)).tensor_split(collectives.world_size())[collectives.rank()]
    found = knn.search(queries[ours], bank[mine], K, tile=tile)
    voted = knn.vote(found.similarity, gather_rows(label[mine])[found.index], CLASSES, TEMPERATURE)
    accuracy = knn.accuracy(
        Features(bank[mine], label[mine]),
        Features(queries[ours], truth[ours]),
        KNNOptions(k=K, temperature=TEMPERATURE),
        tile=tile,
    )
    return gather_rows(found.index), gather_rows(voted), accuracy


def assert_exact(got: tuple[Tensor, Tensor, float]) -> None:
    order, voted, accuracy = brute_force()
    assert torch.equal(got[0], order)
    assert torch.equal(got[1], voted)
    assert got[2] == accuracy
    assert 0.3 < accuracy < 0.95  # neither hopeless nor trivial: an error would show


@pytest.mark.parametrize("tile", [1, 10, 64, 4096])
def test_alone_equals_brute_force(tile: int) -> None:
    assert_exact(searched(tile))


Uneven = tuple[list[float], Tensor, Tensor, list[int]]


def uneven() -> Uneven:
    """Fewer rows than ranks: some shards and some blocks of queries are empty."""
    images, labels = torch.eye(2)[:, :, None, None].expand(2, 2, 2, 2), torch.tensor([0, 1])
    options = KNNOptions(k=1)
    shares = [share for _, share in knn.evaluate(pixels, Block(images, labels), Block(images, labels), options)]
    features = extract(pixels, Block(images, labels))
    parts = gather_parts([(torch.tensor([collectives.rank()]),)] * collectives.rank())
    return (
        shares,
        gather_rows(features.x),
        collectives.all_to_all(torch.arange(3) + 10 * collectives.rank()),
        [int(p[0]) for p in parts],
    )


def everything() -> tuple[list[tuple[Tensor, Tensor, float]], Uneven | None]:
    return [searched(tile) for tile in (2, 10, 4096)], uneven() if collectives.world_size() == 3 else None


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_brute_force(world: int) -> None:
    for rank, (several, empty) in enumerate(run_ranks(world, everything)):
        for got in several:
            assert_exact(got)
        if empty:
            shares, x, received, parts = empty
            assert shares == [1.0]
            assert torch.equal(x, torch.eye(2)[:, :, None, None].expand(2, 2, 2, 2).flatten(1))
            assert received.tolist() == [rank, 10 + rank, 20 + rank]
            assert parts == [1, 2, 2]


def test_ties_go_to_the_first_in_the_bank() -> None:
    bank = torch.ones(50, 4)
    found = knn.search(-torch.ones(2, 4), bank, 7, tile=8)
    assert found.index.tolist() == [list(range(7))] * 2
    torch.testing.assert_close(found.similarity, torch.full((2, 7), -1.0))


def test_packed_order_is_the_order_of_similarities() -> None:
    similarity = torch.tensor([[-1.0, -0.5, -1e-30, 0.0, 1e-30, 0.25, 1.0]])
    keys = knn._pack(similarity, torch.arange(7))
    assert keys.argsort(dim=1).tolist() == [list(range(7))]
    found = knn._unpack(keys)
    assert torch.equal(found.similarity, similarity)
    assert found.index.tolist() == [list(range(7))]


def test_votes_are_weighted_and_do_not_overflow() -> None:
    similarity, label = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[0, 1, 1]])
    assert knn.vote(similarity, label, 2, 1.0).tolist() == [1]  # two votes of nearly the same weight win
    assert knn.vote(similarity, label, 2, 0.07).tolist() == [0]  # e^(0.1 / 0.07) > 2
    assert knn.vote(similarity, label, 2, 1e-4).tolist() == [0]


def test_k_beyond_the_bank_is_refused() -> None:
    with pytest.raises(UserError, match="k 200 .* has 50; set evaluate.knn.k to 50 or less"):
        knn.search(torch.ones(1, 4), torch.ones(50, 4), 200)


class Dropping(Method):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Dropout(0.5))


def test_features_are_of_evaluation_mode_and_modes_are_put_back() -> None:
    method = Dropping().train()
    method.encoder.get_submodule("0").eval()
    before = [module.training for module in method.modules()]
    with pytest.raises(RuntimeError, match="stop here"), representing(method) as represent:
        x = represent(make_batch(torch.ones(3, 1, 3, 2, 2)))
        assert torch.equal(x, represent(make_batch(torch.ones(3, 1, 3, 2, 2))))
        assert not x.requires_grad
        raise RuntimeError("stop here")
    assert [module.training for module in method.modules()] == before
