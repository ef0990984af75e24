"""Both linear probes: against scikit-learn, and over ranks against one process."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

from kilobatch.data.batch import Batch, make_batch
from kilobatch.data.errors import UserError
from kilobatch.data.views.options import Crop, Photometric, Views
from kilobatch.trainer.evaluate import fast_linear, linear
from kilobatch.trainer.evaluate.features import Features, extract
from kilobatch.trainer.evaluate.options import SEARCHED_RATES, FastLinearOptions, LinearOptions
from tests.helpers.in_memory_data import Block, Shuffled, clusters, flat, pixels
from tests.helpers.process_groups import run_ranks

CLASSES = 6
TRAIN, TEST = clusters(300, CLASSES, seed=1, noise=5.0), clusters(120, CLASSES, seed=2, noise=5.0)
SLOW = LinearOptions(epochs=3, batch=60, lr=0.05)
FAST = FastLinearOptions(l2=0.05)


def slow() -> tuple[Tensor, dict[str, float]]:
    head = linear.fit(pixels, Shuffled(*TRAIN, batch=60), CLASSES, SLOW).head
    values = dict(linear.evaluate(pixels, Shuffled(*TRAIN, batch=60), Block(*TEST), CLASSES, SLOW))
    return head.weight.detach(), values


def fast() -> tuple[Tensor, dict[str, float]]:
    weight, _ = fast_linear.fit(extract(pixels, Block(*TRAIN)), CLASSES, FAST)
    return weight, dict(fast_linear.evaluate(pixels, Block(*TRAIN), Block(*TEST), CLASSES, FAST))


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
    head = linear.fit(pixels, loader, CLASSES, options).head
    weight = torch.zeros(CLASSES, 192, dtype=torch.float64)
    velocity, step, total = torch.zeros_like(weight), 0, 3 * loader.steps_per_epoch
    bias, bias_velocity = torch.zeros(CLASSES, dtype=torch.float64), torch.zeros(CLASSES, dtype=torch.float64)
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            x = pixels(batch).double()
            lr = 0.05 * 60 / 256 * (1 + torch.cos(torch.tensor(torch.pi * step / total, dtype=torch.float64))) / 2
            error = (x @ weight.T + bias).softmax(1) - torch.eye(CLASSES, dtype=torch.float64)[batch.label]
            gradient, bias_gradient = error.T @ x / len(x), error.mean(0)
            velocity, bias_velocity = 0.9 * velocity + gradient, 0.9 * bias_velocity + bias_gradient
            weight = weight - lr * (gradient + 0.9 * velocity)
            bias = bias - lr * (bias_gradient + 0.9 * bias_velocity)
            step += 1
    torch.testing.assert_close(head.weight.detach().double(), weight, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.bias.detach().double(), bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("protocol", [{"nesterov": False}, {"weight_decay": 0.01}, {"momentum": 0, "nesterov": False}])
@pytest.mark.parametrize("falls", [{}, {"schedule": "steps", "milestones": (1, 2)}])
def test_slow_probe_is_torchs_sgd(protocol: dict[str, Any], falls: dict[str, Any]) -> None:
    options = LinearOptions(epochs=3, batch=60, lr=0.05, **protocol, **falls)
    loader = Shuffled(*TRAIN, batch=60)
    ours = linear.fit(pixels, loader, CLASSES, options).head
    theirs = torch.nn.Linear(192, CLASSES).double()
    for parameter in theirs.parameters():
        torch.nn.init.zeros_(parameter)
    optimizer = torch.optim.SGD(
        theirs.parameters(),
        lr=0.05 * 60 / 256,
        momentum=options.momentum,
        weight_decay=options.decays[0],
        nesterov=options.nesterov,
    )
    by_epochs, by_steps = MultiStepLR(optimizer, [1, 2], 0.1), CosineAnnealingLR(optimizer, 3 * loader.steps_per_epoch)
    for epoch in range(3):
        for batch in loader.epoch(epoch):
            optimizer.zero_grad()
            cross_entropy(theirs(pixels(batch).double()), batch.label).backward()
            optimizer.step()
            if not falls:
                by_steps.step()
        if falls:
            by_epochs.step()
    torch.testing.assert_close(ours.weight.detach().double(), theirs.weight.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.bias.detach().double(), theirs.bias.detach(), rtol=1e-4, atol=1e-6)


MANY, MANY_TEST = clusters(3000, CLASSES, seed=3, noise=5.0), clusters(1500, CLASSES, seed=4, noise=5.0)
GRID = LinearOptions(epochs=4, batch=60, lr=(3e3, 0.05), weight_decay=(0.0, 0.01))


def searched() -> tuple[Tensor, dict[str, float]]:
    fitted = linear.fit(pixels, Shuffled(*TRAIN, batch=60), CLASSES, GRID)
    return fitted.head.weight.detach(), dict(
        linear.evaluate(pixels, Shuffled(*TRAIN, batch=60), Block(*TEST), CLASSES, GRID)
    )


def test_search_is_the_best_rates_training_on_any_ranks() -> None:
    weight, values = searched()
    assert values["linear/lr"] == 0.05 and 0.5 < values["linear/held_out"] <= 1
    alone = GRID.model_copy(update={"lr": values["linear/lr"], "weight_decay": values["linear/weight_decay"]})
    torch.testing.assert_close(
        weight, linear.fit(pixels, Shuffled(*TRAIN, batch=60), CLASSES, alone).head.weight.detach()
    )
    for of_rank, got in run_ranks(2, searched):
        torch.testing.assert_close(of_rank, weight, rtol=1e-4, atol=1e-6)
        assert got == pytest.approx(values)


def test_held_out_images_choose_and_teach_nothing() -> None:
    """Their labels decide on the choice, and change nothing of the classifiers that are chosen by."""
    images, label = TRAIN
    held = linear.held_out(torch.arange(len(label)))
    assert 15 < held.sum() < 45  # a tenth of 300
    assert not torch.equal(held[:60], held[60:120])
    other = label.clone()
    other[held] = (other[held] + 1) % CLASSES
    weights, right = [], []
    for labels in (label, other):
        heads = linear.Heads(192, CLASSES, GRID, torch.device("cpu"))
        for batch in Shuffled(images, labels, batch=60).epoch(0):
            right.append(heads.step(pixels(batch), batch, 1.0))
        weights.append(heads.weight.chunk(2))
    assert torch.equal(weights[0][1], weights[1][1])
    assert not torch.equal(weights[0][0], weights[1][0])
    assert not torch.equal(torch.stack(right[:5]).sum(0), torch.stack(right[5:]).sum(0))
    _, counted = linear.fit_heads(pixels, Shuffled(images, label, batch=60), CLASSES, GRID)
    assert (counted[0] == held.sum()).all()  # of four epochs the last alone chooses


def test_too_few_images_to_choose_by() -> None:
    few = torch.arange(300)[~linear.held_out(torch.arange(300))][:1]
    heads = linear.Heads(192, CLASSES, GRID, torch.device("cpu"))
    right = heads.step(flat(TRAIN[0][few]), make_batch(TRAIN[0][few][:, None], few, TRAIN[1][few]), 1.0)
    with pytest.raises(UserError, match="so few training images none is held out"):
        heads.best(right)


@pytest.mark.parametrize("scale", [1.0, 1 / 17.3])
def test_search_finds_the_rate_of_features_of_any_scale(scale: float) -> None:
    """Within a point of the best of the rates, each trained by itself: MoCo's features are small."""

    def small(batch: Batch) -> Tensor:
        return pixels(batch) * scale

    def top1(options: LinearOptions) -> float:
        found = linear.evaluate(small, Shuffled(*MANY, batch=256), Block(*MANY_TEST, batch=500), CLASSES, options)
        return dict(found)["linear/top1"]

    options = LinearOptions(epochs=5, lr="search")
    best = max(top1(options.model_copy(update={"lr": lr})) for lr in SEARCHED_RATES)
    assert top1(options) >= best - 0.01


def test_standardisation_and_constant_features() -> None:
    x = torch.cat([torch.randn(50, 3) * 4 + 7, torch.full((50, 1), 3.3)], dim=1)
    mean, scale = fast_linear.moments(x)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(scale[:3], x[:, :3].std(0, correction=0))
    assert scale[3] == 1


def test_top5_with_fewer_classes() -> None:
    logits, label = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]]), torch.tensor([0, 1])
    assert linear.top_accuracies(logits, label) == {1: 0.5, 5: 1.0}


def test_probe_crops_by_torchvisions_default_and_flips_as_the_recipe() -> None:
    views = linear.probe_views(Views(size=96, flip=0.25, crop=Crop(scale=(0.2, 1.0)), photometric=Photometric()))
    assert (views.count, views.size, views.flip, views.crop) == (1, 96, 0.25, Crop(scale=(0.08, 1.0)))
    assert linear.probe_views(Views(crop=None)).crop is None  # digits: there is nothing to crop
    own = LinearOptions(crop=Crop(scale=(0.5, 1.0)), flip=0.0)
    assert (linear.probe_views(Views(), own).crop, linear.probe_views(Views(), own).flip) == (own.crop, 0.0)
    assert (views.jitter, views.grey, views.blur, views.solarize, views.affine) == (None, 0, None, None, None)
    assert views.photometric is None


def test_protocol_in_words() -> None:
    views = Views(crop=Crop(scale=(0.2, 1.0)))
    mocos = LinearOptions(lr=30, schedule="steps", milestones=(60, 80), epochs=100, nesterov=False)
    assert mocos.protocol(linear.probe_views(views, mocos)) == (
        "SGD on frozen features of crops of 0.08 to 1 of the area, flipped with probability 0.5, lr 30 per 256, x0.1 "
        "after epochs 60, 80 of 100, batch 256, momentum 0.9, decay 0"
    )
    searched = LinearOptions(lr="search", weight_decay=(0, 1e-5))
    assert searched.protocol(linear.probe_views(Views(crop=None, flip=0), searched)) == (
        "SGD on frozen features of whole images, flipped with probability 0, lr 0.001 to 100 per 256, a cosine over 90 "
        "epochs, batch 256, Nesterov momentum 0.9, decay 0, 1e-05; the best on held-out training images"
    )
