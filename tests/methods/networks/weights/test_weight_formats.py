"""Starting weights in the key layouts of packages: after loading, our features are those of the package's network."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from kilobatch.methods.networks.resnet import ResNet
from kilobatch.methods.networks.vit import ViT, positions
from kilobatch.methods.networks.weights.report import StartReport
from kilobatch.methods.networks.weights.start import start_encoder
from kilobatch.methods.networks.weights.state_file import places_of, read_places

State = dict[str, Tensor]
HEAD = {"0.weight": torch.ones(4, 512), "0.bias": torch.ones(4)}


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return random_resnet()


@pytest.fixture(scope="module")
def plain() -> ResNet:
    return ResNet("resnet18").eval()


@pytest.fixture
def encoder(plain: ResNet) -> ResNet:
    """An encoder of nothing but zeros, so that what is not loaded shows."""
    with torch.no_grad():
        for x in plain.state_dict().values():
            x.zero_()
    return plain


def random_resnet() -> nn.Module:
    """torchvision's ResNet-18 with random weights and running statistics."""
    network = randomised(torchvision.models.resnet18(num_classes=5))
    network.fc = nn.Identity()
    return network


@torch.no_grad()
def randomised(network: nn.Module) -> Any:
    torch.manual_seed(1)
    for name, x in network.state_dict().items():
        if name.endswith("running_var") or (x.ndim == 1 and name.endswith("weight")):
            x.copy_(torch.rand_like(x) + 0.5)
        elif x.is_floating_point() and x.ndim == 1:
            x.copy_(torch.randn_like(x) / 10)
    return network.eval()


def load(encoder: nn.Module, file: Path, least: float = 0.9, prefix: str | None = None) -> StartReport:
    return start_encoder(encoder, *read_places(file), least, prefix)


def assert_same_features(encoder: nn.Module, theirs: Callable[[Tensor], Tensor], size: int = 64) -> None:
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        mine, other = encoder.eval()(images), theirs(images)
    assert other.std() > 1e-3
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def below(prefix: str, state: State) -> State:
    return {prefix + name: x for name, x in state.items()}


def renamed(state: State, first: int, shortcut: bool = False) -> State:
    """As in nn.Sequential of the network's children, where layer1 has the number `first`."""
    numbers = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(first + i - 1) for i in range(1, 5)}}
    found = {}
    for name, x in state.items():
        head, _, rest = name.partition(".")
        rest = rest.replace("downsample", "shortcut") if shortcut else rest
        found[f"{numbers[head]}.{rest}"] = x
    return found


def other(state: State) -> State:
    """Another network of the same shapes, such as a momentum encoder."""
    return {name: x + 1 for name, x in state.items()}


LAYOUTS: dict[str, tuple[str, str, Callable[[State], Any]]] = {
    "torchvision": ("a state dict", "", lambda s: {**s, "fc.weight": torch.ones(5, 512), "fc.bias": torch.ones(5)}),
    "moco v1": (
        "MoCo v1 or v2",
        "state_dict/module.encoder_q.",
        lambda s: {
            "epoch": 200,
            "arch": "resnet18",
            "state_dict": below("module.encoder_k.", other(s))
            | below("module.encoder_q.", s)
            | below("module.encoder_q.fc.", HEAD)
            | {"module.queue": torch.ones(4, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.long)},
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        },
    ),
    "moco v3": (
        "MoCo v3",
        "state_dict/module.base_encoder.",
        lambda s: {
            "state_dict": below("module.momentum_encoder.", other(s))
            | below("module.base_encoder.", s)
            | below("module.predictor.", HEAD)
        },
    ),
    "simclr": (
        "PyTorch SimCLR",
        "state_dict/backbone.",
        lambda s: {"epoch": 1, "arch": "resnet18", "state_dict": below("backbone.", s) | below("backbone.fc.", HEAD)},
    ),
    "simclr by encoder and projector": (
        "PyTorch SimCLR",
        "encoder.",
        lambda s: below("encoder.", s) | below("projector.", HEAD),
    ),
    "byol": (
        "PyTorch BYOL",
        "online_network_state_dict/encoder.",
        lambda s: {
            "target_network_state_dict": below("encoder.", renamed(other(s), 4)),
            "online_network_state_dict": below("encoder.", renamed(s, 4)) | below("projetion.net.", HEAD),
        },
    ),
    "byol by a wrapper": (
        "PyTorch BYOL",
        "online_encoder.net.",
        lambda s: below("target_encoder.net.", other(s)) | below("online_encoder.net.", s) | below("net.", s),
    ),
    "swav": (
        "SwAV",
        "module.",
        lambda s: (
            below("module.", s)
            | below("module.projection_head.", HEAD)
            | {"module.prototypes.weight": torch.ones(3, 4)}
        ),
    ),
    "dino": (
        "DINO's teacher",
        "teacher/backbone.",
        lambda s: {
            "student": below("module.backbone.", other(s)) | below("module.head.mlp.", HEAD),
            "teacher": below("backbone.", s) | below("head.mlp.", HEAD),
            "args": argparse.Namespace(arch="resnet18", lr=0.1),
            "epoch": 3,
        },
    ),
    "barlow twins": (
        "Barlow Twins or VICReg",
        "model/module.backbone.",
        lambda s: {"epoch": 1, "model": below("module.backbone.", s) | below("module.projector.", HEAD)},
    ),
    "vissl": (
        "VISSL",
        "classy_state_dict/base_model/model/trunk/_feature_blocks.",
        lambda s: {
            "phase_idx": 1,
            "classy_state_dict": {
                "base_model": {
                    "model": {"trunk": below("_feature_blocks.", s), "heads": below("0.clf.", HEAD)},
                    "meta": {"name": "x"},
                }
            },
        },
    ),
    "lightly": (
        "lightly",
        "state_dict/backbone.",
        lambda s: {
            "state_dict": below("backbone.", renamed(s, 4)) | below("projection_head.layers.", HEAD),
            "pytorch-lightning_version": "2.4",
        },
    ),
    "solo-learn": (
        "solo-learn",
        "state_dict/backbone.",
        lambda s: {
            "pytorch-lightning_version": "2.4",
            "state_dict": below("momentum_backbone.", other(s))
            | below("backbone.", s)
            | {"classifier.weight": torch.ones(3, 512)},
        },
    ),
    "lightning": (
        "Lightning",
        "state_dict/model.net.",
        lambda s: {"pytorch-lightning_version": "2.4", "state_dict": below("model.net.", s), "loops": {}},
    ),
    "supcontrast": (
        "SupContrast",
        "model/encoder.module.",
        lambda s: {"opt": argparse.Namespace(), "model": below("encoder.module.", s) | below("head.", HEAD)},
    ),
    "simsiam": (
        "SimSiam",
        "state_dict/module.encoder.",
        lambda s: {"state_dict": below("module.encoder.", s) | below("module.encoder.fc.", HEAD)},
    ),
    "without the max-pool": ("an unknown package", "f.", lambda s: below("f.", renamed(s, 3))),
    "shortcuts": ("an unknown package", "f.", lambda s: below("f.", renamed(s, 2, shortcut=True))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_resnets(layout: str, theirs: nn.Module, encoder: ResNet) -> None:
    package, place, written = LAYOUTS[layout]
    content = written(theirs.state_dict())
    report = start_encoder(encoder, places_of(content), [*content], 0.9)
    assert (report.package, report.place) == (package, place)
    assert report.share == 1 and not report.missing and report.tensors == 100
    assert len(report.left) == LEFT.get(layout, 0), report.left
    assert_same_features(encoder, theirs, 32)


LEFT = {"torchvision": 2, "moco v1": 2, "simclr": 2, "simsiam": 2, "swav": 3}  # heads below the encoder's prefix


@pytest.mark.parametrize("file", ["zip", "before torch 1.6"])
def test_files_of_torch_save(file: str, theirs: nn.Module, encoder: ResNet, tmp_path: Path) -> None:
    content = {"state_dict": theirs.state_dict(), "args": argparse.Namespace(arch="resnet18")}
    torch.save(content, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=file == "zip")
    load(encoder, tmp_path / "a.pth.tar")
    assert_same_features(encoder, theirs, 32)


def test_safetensors_in_another_type(theirs: nn.Module, encoder: ResNet, tmp_path: Path) -> None:
    state = {n: x.to(torch.bfloat16) if x.is_floating_point() else x for n, x in theirs.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    load(encoder, tmp_path / "model.safetensors")
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    assert torch.equal(encoder.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"].float())


def test_vit_of_torchvision_with_positions_of_ours(tmp_path: Path) -> None:
    network = torchvision.models.VisionTransformer(32, 16, 2, 12, 384, 4 * 384)
    network.heads = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    network = randomised(network)
    network.encoder.pos_embedding.data = positions(2, 384, torch.device("cpu"))
    torch.save(network.state_dict(), tmp_path / "vit.pth")
    encoder = ViT(384, 2, 12)
    assert load(encoder, tmp_path / "vit.pth").left == []
    assert_same_features(encoder, network, 32)


def test_moco_v3_vit_as_timm_names_it(tmp_path: Path) -> None:
    timm: Any = pytest.importorskip("timm", reason="timm is not installed: its vision transformers are not compared")
    network = timm.models.VisionTransformer(32, 16, embed_dim=384, depth=2, num_heads=12, num_classes=0)
    network = randomised(network)
    network.pos_embed.data = positions(2, 384, torch.device("cpu"))
    state = below("module.base_encoder.", network.state_dict()) | below("module.base_encoder.head.", HEAD)
    torch.save({"state_dict": state}, tmp_path / "vit.pth")
    encoder = ViT(384, 2, 12)
    assert load(encoder, tmp_path / "vit.pth").package == "MoCo v3"
    assert_same_features(encoder, network, 32)


@pytest.mark.parametrize(
    ("name", "ours"), [("resnet18", "resnet18"), pytest.param("resnet50", "resnet50", marks=pytest.mark.slow)]
)
def test_resnets_of_timm(name: str, ours: str, tmp_path: Path) -> None:
    timm: Any = pytest.importorskip("timm", reason="timm is not installed: its ResNets are not compared")
    network = randomised(timm.create_model(name))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    network.reset_classifier(0)
    encoder = ResNet(ours)
    load(encoder, tmp_path / "model.safetensors")
    assert_same_features(encoder, network)


def test_resnet_of_lightly(tmp_path: Path) -> None:
    lightly: Any = pytest.importorskip("lightly.models", reason="lightly is not installed: its ResNet is not compared")
    children = list(randomised(lightly.ResNetGenerator("resnet-18")).children())[:-1]
    backbone = nn.Sequential(*children, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    torch.save(
        {"state_dict": below("backbone.", backbone.state_dict()) | below("projection_head.layers.", HEAD)},
        tmp_path / "last.ckpt",
    )
    encoder = ResNet("resnet18", "cifar")
    assert load(encoder, tmp_path / "last.ckpt").package == "lightly"
    images = torch.randn(2, 3, 32, 32)
    x = images
    with torch.no_grad():
        for number, part in enumerate(backbone.eval()):  # it has no ReLU of its own behind the first norm
            x = part(x).relu() if number == 1 else part(x)
        torch.testing.assert_close(encoder.eval()(images), x, rtol=1e-5, atol=1e-5)
