"""Optimizers built from recipes: their groups, options and learning rates."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import OptimizerOptions, scaled_lr

NAMES = ["lars", "sgd", "adamw", "lamb"]


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    net[3].bias.requires_grad_(False)
    return net


def options(**changes: Any) -> OptimizerOptions:
    return OptimizerOptions(**{"lr": 0.1, "weight_decay": 0.1, **changes})


@pytest.mark.parametrize("name", NAMES)
def test_two_groups_with_names(name: str) -> None:
    net = network()
    decayed, excluded = build_optimizer(options(name=name), net, 256).param_groups
    assert decayed["names"] == ["0.weight", "3.weight"]
    assert excluded["names"] == ["0.bias", "1.weight", "1.bias"]  # and not the frozen 3.bias
    assert (decayed["weight_decay"], excluded["weight_decay"]) == (0.1, 0.0)
    named = dict(net.named_parameters())
    for group in (decayed, excluded):
        assert all(named[name] is p for name, p in zip(group["names"], group["params"], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_learns(name: str) -> None:
    torch.manual_seed(0)
    net, x = network(), torch.randn(32, 3, 4, 4)
    optimizer = build_optimizer(options(name=name, lr=2.0 if name == "lars" else 0.01, weight_decay=0.0), net, 256)
    losses = []
    for _ in range(60):
        loss = (net(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_decay_shrinks_only_what_has_more_than_one_dimension(name: str) -> None:
    """With zero gradients the decay alone moves anything."""
    net = network()
    before = {key: value.clone() for key, value in net.named_parameters()}
    optimizer = build_optimizer(options(name=name, momentum=0.0), net, 256)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for key, p in net.named_parameters():
        if p.ndim > 1:
            assert p.norm() < before[key].norm(), key
        else:
            assert torch.equal(p, before[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_decay_norms_shrinks_all(name: str) -> None:
    """With zero gradients. What has one dimension shrinks by 1 - lr * decay, as it is not adapted."""
    net = network()
    torch.nn.init.ones_(net.get_parameter("0.bias"))
    before = {key: value.clone() for key, value in net.named_parameters() if value.requires_grad}
    optimizer = build_optimizer(options(name=name, momentum=0.0, decay_norms=True), net, 256)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for key, p in net.named_parameters():
        if key in before and before[key].any():
            assert p.norm() < before[key].norm(), key
    if name in ("lars", "sgd", "adamw"):
        torch.testing.assert_close(net.get_parameter("1.weight"), 0.99 * before["1.weight"])


def test_a_learnt_temperature_is_never_decayed() -> None:
    method = SimCLR(ConvNet(4, "local"), learn_temperature=True)
    for decay_norms in (False, True):
        groups = build_optimizer(options(decay_norms=decay_norms), method, 256).param_groups
        assert [g["weight_decay"] for g in groups if "log_scale" in g["names"]] == [0.0]
        assert [g["weight_decay"] for g in groups if "head.layers.1.weight" in g["names"]] == [0.1 * decay_norms]
        assert sum((g["names"] for g in groups), []).count("log_scale") == 1


def test_lamb_is_the_papers() -> None:
    """You et al., 2020, algorithm 2 of version 3; the trust ratio on the adapted tensor, none on the excluded one."""
    torch.manual_seed(0)
    w, b = torch.randn(4, 3), torch.randn(4)
    net = nn.Linear(3, 4)
    with torch.no_grad():
        net.weight.copy_(w)
        net.bias.copy_(b)
    optimizer = build_optimizer(options(name="lamb", epsilon=1e-6), net, 256)
    moments = {key: (torch.zeros_like(x), torch.zeros_like(x)) for key, x in (("w", w), ("b", b))}
    for step in range(5):
        gradients = {"w": torch.full_like(w, 0.1 * step) + w, "b": b + step}
        net.weight.grad, net.bias.grad = gradients["w"].clone(), gradients["b"].clone()
        optimizer.step()
        updates = {}
        for key, g in gradients.items():
            m, v = moments[key]
            moments[key] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            updates[key] = m / (v.sqrt() + 1e-6)
        updates["w"] += 0.1 * w
        w = w - 0.1 * w.norm() / (updates["w"].norm() + 1e-6) * updates["w"]
        b = b - 0.1 * updates["b"]
    torch.testing.assert_close(net.weight.detach(), w)
    torch.testing.assert_close(net.bias.detach(), b)


def test_lars_has_the_recipes_options() -> None:
    optimizer = build_optimizer(
        options(dialect="bolts", nesterov=True, momentum=0.8, trust_coefficient=0.02), network(), 256
    )
    assert isinstance(optimizer, LARS)
    assert (optimizer.dialect, optimizer.nesterov) == ("bolts", True)
    assert [(g["momentum"], g["trust_coefficient"], g["adapt"]) for g in optimizer.param_groups] == [
        (0.8, 0.02, True),
        (0.8, 0.02, False),
    ]


@pytest.mark.parametrize(("scaling", "lr"), [("none", 4.8), ("linear", 0.3), ("sqrt", 0.075)])
def test_simclrs_rates_meet_at_4096(scaling: str, lr: float) -> None:
    assert scaled_lr(options(scaling=scaling, lr=lr), 4096) == pytest.approx(4.8)


def test_scaling_reaches_the_groups() -> None:
    assert [g["lr"] for g in build_optimizer(options(scaling="linear"), network(), 512).param_groups] == [0.2, 0.2]


def test_nothing_excluded_leaves_one_group() -> None:
    assert len(build_optimizer(options(), nn.Linear(2, 2, bias=False), 256).param_groups) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "lras"},
        {"lr": 0},
        {"lr": float("inf")},
        {"momentum": 1.0},
        {"dialect": "x"},
        {"wd": 1},
        {"betas": (0.9, 1)},
    ],
)
def test_refuses(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OptimizerOptions(**wrong)
