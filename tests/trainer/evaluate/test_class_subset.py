"""Test images of some of the training's classes: every evaluator predicts these alone, on any number of ranks."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from kilobatch.data.batch import Batch, make_batch
from kilobatch.methods import collectives
from kilobatch.trainer.evaluate import classify, fast_linear, knn, linear, moved
from kilobatch.trainer.evaluate.class_subset import Relabelled, only_among
from kilobatch.trainer.evaluate.features import Features, extract
from kilobatch.trainer.evaluate.options import FastLinearOptions, KNNOptions, LinearOptions
from tests.helpers.in_memory_data import Block, Shuffled, clusters, flat, pixels
from tests.helpers.process_groups import run_ranks

CLASSES, AMONG = 12, [1, 4, 5, 7, 9, 11]
NUMBERS = [9, 1, 4, 11, 5, 7]  # of the test's classes, in the test's order
K, TEMPERATURE = 9, 0.07
TRAIN = clusters(240, CLASSES, seed=1, noise=6.0)
EVERY = clusters(300, CLASSES, seed=2, noise=6.0)
CHOSEN = [i for i, label in enumerate(EVERY[1].tolist()) if label in AMONG]
TEST = EVERY[0][CHOSEN], torch.tensor([NUMBERS.index(label) for label in EVERY[1][CHOSEN].tolist()])


def asked() -> Relabelled:
    return Relabelled(Block(*TEST), NUMBERS)


def brute_force_knn(restricted: bool) -> float:
    right = 0
    bank, queries = (normalize(flat(images).double(), dim=1) for images in (TRAIN[0], TEST[0]))
    for query, label in zip(queries, TEST[1].tolist(), strict=True):
        similarity = bank @ query
        votes: dict[int, float] = {}
        for i in similarity.argsort(descending=True)[:K].tolist():
            voted = int(TRAIN[1][i])
            if not restricted or voted in AMONG:
                votes[voted] = votes.get(voted, 0.0) + float(torch.exp(similarity[i] / TEMPERATURE))
        right += max(votes, key=votes.__getitem__, default=None) == NUMBERS[label]
    return right / len(CHOSEN)


def brute_force_top(logits: Tensor) -> dict[int, float]:
    """The share of rows whose class is among the first one or five of the test's classes, by a plain loop."""
    found = {1: 0, 5: 0}
    for row, label in zip(logits.tolist(), TEST[1].tolist(), strict=True):
        order = sorted(AMONG, key=lambda number: -row[number])
        for k in found:
            found[k] += NUMBERS[label] in order[:k]
    return {k: count / len(CHOSEN) for k, count in found.items()}


SLOW, FAST = LinearOptions(epochs=3, batch=60, lr=0.05), FastLinearOptions(l2=0.05)


def values(among: list[int] | None) -> dict[str, float]:
    train, test = Block(*TRAIN), asked()
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    found = dict(knn.evaluate(pixels, train, test, KNNOptions(k=K, temperature=TEMPERATURE), among))
    found |= dict(linear.evaluate(pixels, Shuffled(*TRAIN, batch=60), test, CLASSES, SLOW, among))
    found |= dict(fast_linear.evaluate(pixels, train, test, CLASSES, FAST, among))
    found |= dict(classify.evaluate(prior, test, "classify", among))
    return found | dict(moved.evaluate(pixels, pixels, train, test, mean, std, among))


def prior(batch: Batch) -> Tensor:
    """Logits of a poor classifier, which prefers the classes that the test does not have."""
    bonus = torch.tensor([0.0 if number in AMONG else 9.0 for number in range(CLASSES)])
    return pixels(batch)[:, :CLASSES] + bonus


def test_labels_are_the_trainings() -> None:
    assert torch.equal(torch.cat([batch.label for batch in asked()]), EVERY[1][CHOSEN])
    assert asked().samples == len(CHOSEN)


def test_all_evaluators_predict_these_classes_alone() -> None:
    got, free = values(AMONG), values(None)
    assert got["knn/top1"] == brute_force_knn(True)
    assert free["knn/top1"] == brute_force_knn(False)
    x = flat(TEST[0])
    head = linear.fit(pixels, Shuffled(*TRAIN, batch=60), CLASSES, SLOW).head
    bank = extract(pixels, Block(*TRAIN))
    mean, scale = fast_linear.moments(bank.x)
    weight, bias = fast_linear.fit(Features((bank.x - mean) / scale, bank.label), CLASSES, FAST)
    for name, logits in (
        ("linear", head(x).detach()),
        ("fast_linear", (x - mean) / scale @ weight.T + bias),
        ("classify", prior(make_batch(TEST[0][:, None]))),
    ):
        for k, share in brute_force_top(logits).items():
            assert got[f"{name}/top{k}"] == pytest.approx(share), (name, k)
        assert got[f"{name}/top1"] > free[f"{name}/top1"]
    assert free["classify/top5"] < 0.2 < 0.5 < got["classify/top5"]
    assert got["moved/clean/trained"] > free["moved/clean/trained"]


def on_ranks() -> dict[str, float]:
    assert collectives.world_size() == 3
    return values(AMONG)


def test_ranks_equal_one_process() -> None:
    alone = values(AMONG)
    for got in run_ranks(3, on_ranks):
        assert got == pytest.approx(alone, abs=0.02)  # L-BFGS and SGD sum in another order
        assert got["knn/top1"] == alone["knn/top1"]


def test_no_vote_is_no_prediction() -> None:
    """Where no neighbour is of the test's classes, none of them is guessed."""
    similarity, label = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.8, 0.1]]), torch.tensor([[0, 0, 3], [0, 0, 2]])
    assert knn.vote(similarity, label, 4, 0.07, [1, 2]).tolist() == [-1, 2]
    assert knn.vote(similarity, label, 4, 1e-4, [1, 2]).tolist() == [-1, 2]  # its weight does not underflow
    assert knn.vote(similarity, label, 4, 0.07).tolist() == [0, 0]


def test_fewer_than_five_classes() -> None:
    logits, label = torch.tensor([[9.0, 3.0, 2.0, 1.0]] * 2), torch.tensor([1, 2])
    assert linear.top_accuracies(logits, label, [1, 2]) == {1: 0.5, 5: 1.0}
    assert linear.top_accuracies(logits, label) == {1: 0.0, 5: 1.0}
    assert only_among(logits, [1, 2]).isfinite().tolist() == [[False, True, True, False]] * 2
