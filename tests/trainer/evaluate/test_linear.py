"""Both linear probes: against scikit-learn, and over ranks against one process."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kilobatch.data.views.options import Views
from kilobatch.trainer.evaluate import fast_linear, linear
from kilobatch.trainer.evaluate.features import Features, extract
from kilobatch.trainer.evaluate.options import FastLinearOptions, LinearOptions
from tests.helpers.in_memory_data import Block, Shuffled, clusters, flat
from tests.helpers.process_groups import run_ranks

CLASSES = 6
TRAIN, TEST = clusters(300, CLASSES, seed=1, noise=5.0), clusters(120, CLASSES, seed=2, noise=5.0)
SLOW = LinearOptions(epochs=3, batch=60, lr=0.05)
FAST = FastLinearOptions(l2=0.05)


def slow() -> tuple[Tensor, dict[str, float]]:
    head = linear.fit(flat, Shuffled(*TRAIN, batch=60), CLASSES, SLOW)
    values = dict(linear.evaluate(flat, Shuffled(*TRAIN, batch=60), Block(*TEST), CLASSES, SLOW))
    return head.weight.detach(), values


def fast() -> tuple[Tensor, dict[str, float]]:
    weight, _ = fast_linear.fit(extract(flat, Block(*TRAIN)), CLASSES, FAST)
    return weight, dict(fast_linear.evaluate(flat, Block(*TRAIN), Block(*TEST), CLASSES, FAST))


def both() -> tuple[tuple[Tensor, dict[str, float]], tuple[Tensor, dict[str, float]]]:
    return slow(), fast()


def test_ranks_equal_one_process() -> None:
    (alone, values), (fast_alone, fast_values) = both()
    ranks = run_ranks(2, both)
    for (weight, got), (fast_weight, fast_got) in ranks:
        torch.testing.assert_close(weight, alone, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(fast_weight, fast_alone, rtol=0, atol=1e-3)
        assert got == pytest.approx(values)
        assert fast_got == pytest.approx(fast_values, abs=0.01)
        assert torch.equal(weight, ranks[0][0][0])
        assert torch.equal(fast_weight, ranks[0][1][0])
    assert set(values) == {"linear/top1", "linear/top5"}
    assert set(fast_values) == {"fast_linear/top1", "fast_linear/top5"}
    assert 0.5 < values["linear/top1"] < values["linear/top5"] <= 1
    assert 0.5 < fast_values["fast_linear/top1"] < fast_values["fast_linear/top5"] <= 1


def test_fast_probe_finds_scikit_learns_minimum() -> None:
    from sklearn.linear_model import LogisticRegression  # here, so that the ranks do not load it

    x, label = flat(TRAIN[0]), TRAIN[1]
    weight, bias = fast_linear.fit(Features(x, label), CLASSES, FAST)
    theirs = LogisticRegression(C=1 / (FAST.l2 * len(x)), tol=1e-8, max_iter=2000).fit(x.double().numpy(), label)
    their_weight, their_bias = torch.tensor(theirs.coef_), torch.tensor(theirs.intercept_)
    torch.testing.assert_close(weight.double(), their_weight, rtol=0, atol=1e-3)

    def objective(weight: Tensor, bias: Tensor) -> float:
        loss = cross_entropy(x.double() @ weight.double().T + bias.double(), label)
        return float(loss + FAST.l2 / 2 * weight.double().square().sum())

    assert objective(weight, bias) == pytest.approx(objective(their_weight, their_bias), rel=1e-4)
    assert objective(weight, bias) < 0.99 * objective(weight, bias + torch.linspace(-1, 1, CLASSES))


def test_slow_probe_is_sgd_with_nesterov_and_a_cosine() -> None:
    """Against softmax regression written without autograd."""
    options = LinearOptions(epochs=3, batch=60, lr=0.05, momentum=0.9)
    loader = Shuffled(*TRAIN, batch=60)
    head = linear.fit(flat, loader, CLASSES, options)
    weight = torch.zeros(CLASSES, 192, dtype=torch.float64)
    velocity, step, total = torch.zeros_like(weight), 0, 3 * loader.steps_per_epoch
    bias, bias_velocity = torch.zeros(CLASSES, dtype=torch.float64), torch.zeros(CLASSES, dtype=torch.float64)
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            x = flat(batch.views[:, 0]).double()
            lr = 0.05 * 60 / 256 * (1 + torch.cos(torch.tensor(torch.pi * step / total, dtype=torch.float64))) / 2
            error = (x @ weight.T + bias).softmax(1) - torch.eye(CLASSES, dtype=torch.float64)[batch.label]
            gradient, bias_gradient = error.T @ x / len(x), error.mean(0)
            velocity, bias_velocity = 0.9 * velocity + gradient, 0.9 * bias_velocity + bias_gradient
            weight = weight - lr * (gradient + 0.9 * velocity)
            bias = bias - lr * (bias_gradient + 0.9 * bias_velocity)
            step += 1
    torch.testing.assert_close(head.weight.detach().double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.bias.detach().double(), bias, rtol=1e-4, atol=1e-6)


def test_standardisation_and_constant_features() -> None:
    x = torch.cat([torch.randn(50, 3) * 4 + 7, torch.full((50, 1), 3.3)], dim=1)
    mean, scale = fast_linear.moments(x)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(scale[:3], x[:, :3].std(0, correction=0))
    assert scale[3] == 1


def test_top5_with_fewer_classes() -> None:
    logits, label = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), torch.tensor([0, 1])
    assert linear.top_accuracies(logits, label) == {1: 0.5, 5: 1.0}


def test_probe_keeps_the_recipes_crop_and_flip_alone() -> None:
    views = linear.probe_views(Views(size=96, flip=0.25))
    assert (views.count, views.size, views.flip, views.crop) == (1, 96, 0.25, Views().crop)
    assert (views.jitter, views.grey, views.blur, views.solarize, views.affine) == (None, 0, None, None, None)
