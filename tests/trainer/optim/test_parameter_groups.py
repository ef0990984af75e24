"""An optimizer's groups: the rules for all, the method's exceptions, what a recipe freezes, and rates by depth."""

from collections.abc import Sequence
from math import inf
from typing import Any

import pytest
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.methods.method import DataFacts, Method
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.resnet import ResNet
from kilobatch.methods.networks.vit import ViT
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.methods.parameter_groups import ParameterGroup
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.optim.parameter_groups import RULE

DECAY = 0.1


class Grouped(Method):
    """A convolution, a norm, a head with a name that another begins with, and what a test says of their groups."""

    def __init__(self, *groups: ParameterGroup) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.head, self.header = nn.Linear(4, 2), nn.Linear(4, 2)
        self.own = groups

    def groups(self) -> Sequence[ParameterGroup]:
        return self.own


def groups(module: nn.Module, **options: Any) -> list[dict[str, Any]]:
    section = {"name": "adamw", "lr": 0.5, "weight_decay": DECAY, **options}
    return build_optimizer(OptimizerOptions.model_validate(section), module, 256).param_groups


def by_name(module: nn.Module, **options: Any) -> dict[str, dict[str, Any]]:
    return {name: group for group in groups(module, **options) for name in group["names"]}


def without_exceptions(module: nn.Module, decay_norms: bool) -> list[tuple[list[str], float, bool]]:
    """Names, decay and adaptation of each group, in order, as the project's first groups were."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    matrices, vectors = ([name for name, p in named if (p.ndim > 1) == large] for large in (True, False))
    return [(matrices, DECAY, True), (vectors, DECAY * decay_norms, False)]


@pytest.mark.parametrize("decay_norms", [False, True])
def test_without_exceptions_there_are_two_groups(decay_norms: bool) -> None:
    for module in (Grouped(), SimCLR(ConvNet(4)), ConvNet(4)):
        found = groups(module, decay_norms=decay_norms)
        assert [(g["names"], g["weight_decay"], g["adapt"]) for g in found] == without_exceptions(module, decay_norms)
        assert all(g["lr"] == 0.5 for g in found)


@pytest.mark.parametrize("decay_norms", [False, True])
def test_the_methods_exceptions_stand_where_they_did(decay_norms: bool) -> None:
    """SimCLR's learnt temperature has no decay, whatever decay_norms says; fine-tuning's classifier is not adapted."""
    found = groups(method := SimCLR(ConvNet(4), learn_temperature=True), decay_norms=decay_norms)
    (matrices, *_), (vectors, *_) = without_exceptions(method, decay_norms)
    vectors.remove("log_scale")
    expected = [(matrices, DECAY), (vectors, DECAY), (["log_scale"], 0.0)]
    if not decay_norms:
        expected = [(matrices, DECAY), ([name for name, p in method.named_parameters() if p.ndim <= 1], 0.0)]
    assert [(g["names"], g["weight_decay"]) for g in found] == expected
    tuned = FineTune(ConvNet(4))
    tuned.prepare(DataFacts(10, 3))
    adapted, classifier, rest = groups(tuned, decay_norms=decay_norms)
    assert classifier["names"] == ["classifier.weight"] and "classifier.weight" not in adapted["names"]
    assert [g["adapt"] for g in (adapted, classifier, rest)] == [True, False, False]
    assert [g["weight_decay"] for g in (adapted, classifier, rest)] == [DECAY, DECAY, DECAY * decay_norms]


def test_the_first_group_that_holds_a_parameter_counts() -> None:
    first = ParameterGroup("head.weight", lr=0.1, adapt=False)
    second = ParameterGroup("head", lr=9.0, decay=2.0, from_epoch=1.5, schedule=False)
    found = by_name(Grouped(first, second, ParameterGroup("", decay=0.5)))
    rules = {name: found[name][RULE] for name in found}
    assert rules["head.weight"] == ParameterGroup("", lr=0.1, decay=1.0, adapt=False)
    assert rules["head.bias"] == ParameterGroup("", 9.0, False, 2.0, False, 1.5)
    assert found["head.bias"]["weight_decay"] == 2 * DECAY
    assert rules["header.weight"] == ParameterGroup("", decay=0.5, adapt=True)  # "head" is not the beginning of a part
    assert found["encoder.1.weight"] is found["header.bias"]


def test_a_prefix_that_nothing_has_is_an_error() -> None:
    with pytest.raises(AssertionError, match=r"Grouped.groups\(\) has the prefix 'heads', which no parameter has"):
        groups(Grouped(ParameterGroup("heads")))


def test_what_is_frozen_has_no_gradient_and_no_group() -> None:
    method = Grouped(ParameterGroup("header.bias", from_epoch=inf))
    found = by_name(method, freeze=["encoder.0", "header.weight"])
    frozen = {name for name, p in method.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.0.weight", "encoder.0.bias", "header.weight", "header.bias"}
    assert found.keys() == {name for name, _ in method.named_parameters()} - frozen


@pytest.mark.parametrize(
    ("freeze", "own", "says"),
    [
        (["encodr"], [], r"optimizer.freeze has 'encodr', and no parameter's name begins so; did you mean 'encoder'\?"),
        (["encoder.3"], [], "no parameter's name begins so; did you mean 'encoder.[01]'"),
        (["head"], [ParameterGroup("head.bias", lr=2.0)], "the method says itself how head.bias is trained"),
        (["encoder", "head", "header"], [], "leaves nothing to train"),
    ],
)
def test_refuses_to_freeze(freeze: list[str], own: list[ParameterGroup], says: str) -> None:
    with pytest.raises(UserError, match=says):
        groups(Grouped(*own), freeze=freeze)


def vit_rate(name: str, blocks: int, factor: float) -> float:
    """facebookresearch/mae, util/lr_decay.py, with torchvision's names."""
    layers, name = blocks + 1, name.removeprefix("encoder.")
    if not name.startswith(("class_token", "conv_proj", "encoder.layers.")):
        return 1.0
    layer = int(name.split("encoder_layer_")[1].split(".")[0]) + 1 if "encoder_layer_" in name else 0
    return factor ** (layers - layer)


def test_a_vits_rates_fall_with_depth_as_in_maes_fine_tuning() -> None:
    method = FineTune(ViT(8, 11, 2))
    method.prepare(DataFacts(10, 3))
    found = by_name(method, layer_decay=0.65)
    for name in (name for name, p in method.named_parameters() if p.requires_grad):
        assert found[name][RULE].lr == pytest.approx(vit_rate(name, 11, 0.65), rel=1e-12), name
    assert found["encoder.encoder.layers.encoder_layer_1.ln_1.bias"][RULE].lr == pytest.approx(0.65**10)
    assert not found["classifier.weight"]["adapt"] and found["classifier.weight"][RULE].lr == 1.0


def test_a_resnets_rates_fall_by_stage() -> None:
    method = SimCLR(ResNet("resnet18"))
    found = by_name(method, layer_decay=0.5, freeze=["encoder.layer2"])
    rates = {".".join(name.split(".")[:2]): group[RULE].lr for name, group in found.items()}
    stages = {"encoder.conv1": 2**-5, "encoder.bn1": 2**-5, "encoder.layer1": 2**-4, "encoder.layer3": 0.25}
    assert rates == {**stages, "encoder.layer4": 0.5, "head.layers": 1.0}


@pytest.mark.parametrize("encoder", [ConvNet(4), ResNet("resnet18"), ResNet("resnet50", sk_ratio=0.0625), ViT(8, 2, 2)])
def test_every_part_of_an_encoder_is_named_once(encoder: Encoder) -> None:
    parts = [ParameterGroup(prefix) for part in encoder.by_depth() for prefix in part]
    names = [name for name, _ in encoder.named_parameters()]
    assert all(any(part.holds(name) for name in names) for part in parts)
    unnamed = [name for name in names if sum(part.holds(name) for part in parts) != 1]
    assert unnamed == (["encoder.ln.weight", "encoder.ln.bias"] if isinstance(encoder, ViT) else [])


class Unordered(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.features, self.norm, self.layer = 4, "local", nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images.mean((2, 3)))


def test_an_encoder_without_order_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="Unordered does not say the order of its parts; use optimizer.layer_decay=1"):
        groups(SimCLR(Unordered()), layer_decay=0.5)
    with pytest.raises(UserError, match="layer_decay is 0.5, but a Sequential does not say"):
        groups(Grouped(), layer_decay=0.5)
    assert by_name(SimCLR(Unordered()), layer_decay=1.0)["encoder.layer.weight"][RULE].lr == 1
