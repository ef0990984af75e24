"""The encoders that are listed of a file: their places, networks and packages, and the one that is taken first."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.resnet import ResNet
from kilobatch.methods.networks.vit import ViT, positions
from kilobatch.methods.networks.weights.contents import HeldEncoder, encoders_in
from kilobatch.methods.networks.weights.formats import spellings
from kilobatch.methods.networks.weights.start import start_encoder
from kilobatch.methods.networks.weights.state_file import places_of
from tests.methods.networks.weights.test_weight_formats import LAYOUTS, below, other, random_resnet

# How many encoders each file of test_weight_formats has: the other one is a momentum encoder, a student or a target.
SEVERAL = {"moco v1": 2, "moco v3": 2, "byol": 2, "byol by a wrapper": 3, "dino": 2, "solo-learn": 2}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_resnet().state_dict()


def listed(content: dict[str, Any]) -> list[HeldEncoder]:
    return encoders_in(places_of(content), [*content])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_is_the_one_that_is_taken(layout: str, state: dict[str, Tensor]) -> None:
    package, place, written = LAYOUTS[layout]
    content = written(state)
    first, *others = listed(content)
    assert (first.package, first.place, first.tensors) == (package, place, 100)
    assert first.options is not None and (first.options.name, first.options.stem) == ("resnet18", "imagenet")
    assert len(others) + 1 == SEVERAL.get(layout, 1)
    for held in (first, *others):
        encoder = ResNet("resnet18")
        report = start_encoder(encoder, places_of(content), [*content], 1.0, held.place)
        assert report.place == held.place and report.share == 1


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (ResNet("resnet34"), {"name": "resnet34", "width": 1}),
        (ResNet("resnet18", "cifar"), {"name": "resnet18", "stem": "cifar", "width": 1}),
        (ResNet("resnet18", width=2), {"name": "resnet18", "width": 2}),
        (ConvNet(8, "local"), {"name": "convnet", "width": 8}),
        (ViT(384, 12, 12), {"name": "vit_small"}),
        (torchvision.models.resnet101(), {"name": "resnet101", "width": 1}),
    ],
    ids=str,
)
def test_networks_of_ours(network: nn.Module, expected: dict[str, Any]) -> None:
    (found,) = listed(dict(network.state_dict()))
    assert found.options is not None and found.place == ""
    assert found.options.model_dump(exclude_defaults=True) | {"name": found.options.name} == expected


@pytest.mark.parametrize("learnt", [False, True])
def test_a_vit_is_ours_with_fixed_positions_alone(learnt: bool) -> None:
    """In timm's spelling, as MoCo v3 and DINO have it; all other tensors are those of our ViT-Small."""
    state = ViT(384, 12, 12).state_dict()
    as_timm = next(names for names in spellings(state) if "cls_token" in names.values())
    grid = positions(14, 384, torch.device("cpu"))
    content = {as_timm[name]: x for name, x in state.items()} | {"pos_embed": grid + 0.1 * learnt}
    (found,) = listed(content)
    assert (found.options is None) == learnt
    assert found.options is None or found.options.name == "vit_small"


def test_a_network_of_others_by_the_place_where_its_package_has_it() -> None:
    network = torchvision.models.VisionTransformer(32, 16, 12, 6, 384, 4 * 384)
    state = {name: x for name, x in network.state_dict().items() if not name.startswith("heads.")}
    content = {
        "teacher": below("backbone.", state) | {"head.mlp.weight": torch.ones(3, 3)},
        "student": below("module.backbone.", other(state)),
    }
    first, second = listed(content)
    assert (first.package, first.place, first.options) == ("DINO's teacher", "teacher/backbone.", None)
    assert (second.package, second.place) == ("DINO's student", "student/module.backbone.")
    assert first.tensors == second.tensors == len(state)


def test_a_plain_state_dict_of_others() -> None:
    network = torchvision.models.mobilenet_v3_small()
    (found,) = listed({"model": network.state_dict(), "epoch": 3})
    counted = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    assert (found.package, found.place, found.options) == ("a state dict", "model/", None)
    assert found.tensors == len(counted)


def test_a_deeper_network_is_not_taken_for_a_part_of_it(state: dict[str, Tensor]) -> None:
    further = state | {name.replace("layer4.1", "layer4.2"): x for name, x in state.items() if "layer4.1" in name}
    (found,) = listed(further)
    assert found.options is None and found.tensors == 110


def test_no_weights_no_encoder() -> None:
    assert listed({"mean": torch.zeros(3), "std": torch.ones(3)}) == []


def test_one_that_is_there_twice_in_places_of_one_kind(state: dict[str, Tensor], tmp_path: Path) -> None:
    one, two = listed({"a": state, "b": other(state)})
    assert one.number == two.number and (one.place, two.place) == ("a/", "b/")
