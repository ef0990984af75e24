"""docs/guides/coming-from.md against timm itself: its parameters, its rates by layer, its warm-up and colours."""

import inspect
from math import log
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.optim.parameter_groups import RULE, parameter_groups
from kilobatch.trainer.optim.schedules import ScheduleOptions, lr_at
from tests.guides import coming_from_page as page

REASON = "timm is not installed: the page's rows of it are not compared"
timm: Any = pytest.importorskip("timm", reason=REASON)
for part in ("data", "optim", "scheduler", "utils"):
    pytest.importorskip(f"timm.{part}", reason=REASON)
FUNCTIONS = {
    "create_model": timm.create_model,
    "create_optimizer_v2": timm.optim.create_optimizer_v2,
    "create_scheduler_v2": timm.scheduler.create_scheduler_v2,
    "create_transform": timm.data.create_transform,
    "dispatch_clip_grad": timm.utils.dispatch_clip_grad,
    "ModelEmaV3": timm.utils.ModelEmaV3,
}
# Not parameters of the function itself: it hands them to the network, or to the optimizer.
HANDED_ON = {"drop_path_rate": "test_vit", "eps": "adamw", "betas": "adamw"}
CALLS = page.calls("timm")
DECAY, LAYER_DECAY = 0.05, 0.5


@pytest.mark.parametrize(("row", "name", "arguments"), CALLS, ids=[row.id for row, *_ in CALLS])
def test_a_row_names_a_parameter(row: page.PageRow, name: str, arguments: dict[str, str]) -> None:
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    assert arguments and arguments.keys() - HANDED_ON.keys() <= parameters.keys()
    if "drop_path_rate" in arguments:
        timm.create_model(HANDED_ON["drop_path_rate"], drop_path_rate=0.2)
    for key in arguments.keys() & {"eps", "betas"}:
        given = {"eps": 1e-6, "betas": (0.8, 0.9)}[key]
        optimizer = timm.optim.create_optimizer_v2(nn.Linear(2, 2), opt=HANDED_ON[key], lr=0.1, **{key: given})
        assert optimizer.defaults[key] == given


def theirs(name: str) -> dict[str, tuple[int, float]]:
    """By a parameter's name: the power of the layer decay in its rate, and its weight decay."""
    network = timm.create_model(name)
    names = {id(p): key for key, p in network.named_parameters()}
    apart = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    groups = timm.optim.param_groups_layer_decay(network, DECAY, no_weight_decay_list=apart, layer_decay=LAYER_DECAY)
    return {names[id(p)]: (power(g["lr_scale"]), g["weight_decay"]) for g in groups for p in g["params"]}


def ours(name: str) -> dict[str, tuple[int, float]]:
    method = SimCLR(build_encoder(EncoderOptions(name=f"timm/{name}")))
    options = OptimizerOptions(name="adamw", layer_decay=LAYER_DECAY, weight_decay=DECAY)
    groups = [(group, power(group[RULE].lr)) for group in parameter_groups(method, options)]
    prefix = "encoder.network."
    return {
        key.removeprefix(prefix): (rate, group["weight_decay"])
        for group, rate in groups
        for key in group["names"]
        if key.startswith(prefix)
    }


def power(scale: float) -> int:
    exponent = log(scale) / log(LAYER_DECAY)
    assert exponent == pytest.approx(round(exponent))
    return round(exponent)


def differing(name: str) -> dict[str, tuple[tuple[int, float], tuple[int, float]]]:
    """The parameters of the encoder for which rate or decay differ: theirs, ours."""
    want, got = theirs(name), ours(name)
    assert got and not [key for key in want.keys() - got.keys() if not key.startswith(("head.", "fc."))]
    return {key: (want[key], got[key]) for key in got if want[key] != got[key]}


@pytest.mark.parametrize("name", ["test_convnext", "resnet18"])
def test_layer_decay_is_theirs(name: str) -> None:
    assert differing(name) == {}


def test_layer_decay_of_a_vit_but_for_its_last_norm_and_its_tokens() -> None:
    found = differing("test_vit")
    last, first = ((1, 0.0), (0, 0.0)), ((7, 0.0), (7, DECAY))
    assert found == {"norm.weight": last, "norm.bias": last, "cls_token": first, "pos_embed": first}


def test_layer_decay_of_a_stem_of_several_convolutions() -> None:
    norm = ((5, 0.0), (4, 0.0))
    assert differing("test_resnet") == {"bn1.weight": norm, "bn1.bias": norm}


def test_our_own_resnet_has_fewer_parts() -> None:
    parts = [len(build_encoder(EncoderOptions(name=name)).by_depth()) for name in ("resnet50", "timm/resnet50")]
    assert parts == [5, 17] and "`timm/resnet50` has 17" in page.TEXT


@pytest.mark.parametrize("prefix", [False, True])
def test_the_warm_up(prefix: bool) -> None:
    optimizer = timm.optim.create_optimizer_v2(nn.Linear(2, 2), opt="sgd", lr=1.0)
    epochs = 90 if prefix else 100
    scheduler, total = timm.scheduler.create_scheduler_v2(
        optimizer, num_epochs=epochs, warmup_epochs=10, warmup_lr=0.0, warmup_prefix=prefix
    )
    want = [scheduler._get_lr(t)[0] for t in range(100)]
    got = [lr_at(ScheduleOptions(epochs=100, warmup_epochs=10), 1.0, t, 1) for t in range(100)]
    assert total == 100
    if prefix:
        np.testing.assert_allclose(got, want, atol=1e-12)
    else:
        assert want[10] < 0.98 and got[10] == 1  # where the warm-up has ended


def test_sgd_is_nesterovs() -> None:
    assert timm.optim.create_optimizer_v2(nn.Linear(2, 2), opt="sgd", lr=0.1).defaults["nesterov"] is True


def test_colours_and_blur() -> None:
    transform = timm.data.create_transform(
        96, is_training=True, color_jitter=0.4, grayscale_prob=0.2, gaussian_blur_prob=0.5, interpolation="random"
    )
    parts = {type(part).__name__: part for part in transform.transforms}
    assert "ColorJitter" in parts  # in no RandomApply: each view is changed
    jitter, blur = parts["ColorJitter"], parts["RandomApply"].transforms[0]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.6, 1.4) and jitter.hue is None
    assert tuple(blur.kernel_size) == (23, 23) and tuple(blur.sigma) == (0.1, 2.0)
    assert len(parts["RandomResizedCropAndInterpolation"].interpolation) == 2


def test_its_dropped_paths_are_an_option() -> None:
    encoder = build_encoder(EncoderOptions(name="timm/test_vit", options={"drop_path_rate": 0.2})).train()
    assert any("DropPath" in type(module).__name__ for module in encoder.modules())
    with torch.no_grad():
        assert encoder.eval()(torch.zeros(1, 3, 160, 160)).isfinite().all()
