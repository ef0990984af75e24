"""Exports: they load strictly into torchvision, with equal features; wrong outputs are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import kilobatch.methods.networks.resnet
from kilobatch.data.errors import UserError
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.trainer.checkpoint.export import export
from kilobatch.trainer.checkpoint.exported_file import KEY
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.shard import Piece
from kilobatch.trainer.checkpoint.writer import Checkpoints

VIEWS = {"size": 160, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.229]}


NAMES = [f"class {k}" for k in range(10)]


def trained(
    folder: Path, options: EncoderOptions, steps: tuple[int, ...] = (40, 80), views: dict[str, Any] = VIEWS
) -> nn.Module:
    """A run's checkpoints by two ranks; returns the encoder of the last."""
    torch.manual_seed(0)
    encoder = build_encoder(options).eval()
    ranks = [Checkpoints(folder / "checkpoints", CheckpointOptions(), rank, 2) for rank in range(2)]
    recipe = {"encoder": options.model_dump(mode="json"), "method": {"name": "simclr"}, "data": {"views": views}}
    meta = {"recipe": recipe, "images": 1437, "classes": 10, "class_names": NAMES}
    for step in steps:
        for tensor in encoder.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
        pieces = {f"method.encoder.{name}": Piece.of(tensor) for name, tensor in encoder.state_dict().items()}
        pieces["method.head.weight"] = pieces["optimizer.momentum_buffer.encoder.conv1.weight"] = Piece.of(
            torch.ones(3)
        )
        pieces["method.queue.keys"] = Piece.of(torch.ones(3), own=True)
        for rank in ranks:
            rank.save(step, pieces, meta)
        for rank in ranks:
            rank.close()
    return encoder


def test_a_network_of_timm_loads_strictly_into_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    encoder = trained(tmp_path, EncoderOptions(name="timm/test_convnext", options={"drop_path_rate": 0.1}), steps=(1,))
    out = tmp_path / "encoder.safetensors"
    metadata = export(tmp_path, out, report=pytest.fail)
    assert metadata["loads_into"] == "timm.create_model('test_convnext', num_classes=0, drop_path_rate=0.1)"
    theirs = timm.create_model("test_convnext", num_classes=0).eval()
    theirs.load_state_dict(load_file(out), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), encoder(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_loads_strictly_into_torchvision(tmp_path: Path, name: str) -> None:
    options = EncoderOptions.model_validate({"name": name})
    encoder = trained(tmp_path, options)
    out = tmp_path / "encoder.safetensors"
    metadata = export(tmp_path, out, report=pytest.fail)
    theirs: Any = getattr(torchvision.models, name)().eval()
    theirs.load_state_dict(load_file(out), strict=True)
    assert not theirs.fc.weight.any() and not theirs.fc.bias.any()
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), encoder(images))
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == metadata | {KEY: file.metadata()[KEY]}
    assert metadata["loads_into"] == f"torchvision.models.{name}" and metadata["step"] == "80"
    assert {key: json.loads(metadata[key]) for key in VIEWS} == VIEWS


def test_a_vit_loads_strictly_into_torchvision(tmp_path: Path) -> None:
    encoder = trained(tmp_path, EncoderOptions(name="vit_small"), steps=(1,))
    metadata = export(tmp_path, tmp_path / "e.safetensors", report=pytest.fail)
    theirs: Any = eval(metadata["loads_into"], {"torchvision": torchvision}).eval()
    theirs.load_state_dict(load_file(tmp_path / "e.safetensors"), strict=True)
    assert not theirs.heads.head.weight.any() and not theirs.heads.head.bias.any()
    theirs.heads = nn.Identity()
    images = torch.randn(2, 3, VIEWS["size"], VIEWS["size"])
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), encoder(images), rtol=1e-4, atol=1e-4)


def test_other_encoders_keep_their_own_names(tmp_path: Path) -> None:
    options = EncoderOptions.model_validate({"name": "resnet18", "stem": "cifar"})
    encoder = trained(tmp_path, options, steps=(1,))
    metadata = export(tmp_path / "checkpoints/step-00000001", tmp_path / "e.safetensors", report=pytest.fail)
    again = build_encoder(EncoderOptions.model_validate(json.loads(metadata["recipe"])["encoder"]))
    again.load_state_dict(load_file(tmp_path / "e.safetensors"), strict=True)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("options", [{"name": "resnet18", "width": 2}, {"name": "resnet50", "sk_ratio": 0.0625}])
def test_big_resnets_say_what_they_load_into(tmp_path: Path, options: dict[str, Any]) -> None:
    encoder = trained(tmp_path, EncoderOptions.model_validate(options), steps=(1,))
    metadata = export(tmp_path, tmp_path / "e.safetensors", report=pytest.fail)
    again = eval(metadata["loads_into"], {"kilobatch": kilobatch})
    again.load_state_dict(load_file(tmp_path / "e.safetensors"), strict=True)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_max_pool_padded_otherwise_is_no_network_of_torchvisions(tmp_path: Path) -> None:
    trained(tmp_path, EncoderOptions(name="resnet18", stem="imagenet_same"), steps=(1,))
    assert (
        export(tmp_path, tmp_path / "e.safetensors", report=pytest.fail)["loads_into"]
        == "kilobatch.methods.networks.build.build_encoder"
    )
    assert "fc.weight" not in load_file(tmp_path / "e.safetensors")


def test_all_of_a_method(tmp_path: Path) -> None:
    """The method's tensors under its own names; no optimizer state, and no tensor that differs by rank."""
    encoder = trained(tmp_path, EncoderOptions(name="resnet18"), steps=(7,))
    metadata = export(tmp_path, tmp_path / "all.safetensors", whole=True, report=pytest.fail)
    found = load_file(tmp_path / "all.safetensors")
    names = {f"method.encoder.{name}" for name in encoder.state_dict()}
    assert {*found} == names | {"method.head.weight"} and torch.equal(found["method.head.weight"], torch.ones(3))
    assert torch.equal(found["method.encoder.conv1.weight"], encoder.get_parameter("conv1.weight"))
    assert metadata["content"] == "method" and metadata["step"] == "7"
    assert (metadata["images"], metadata["classes"]) == ("1437", "10")
    assert json.loads(metadata["recipe"])["encoder"]["name"] == "resnet18"


@pytest.mark.parametrize("whole", [False, True])
def test_a_file_says_how_images_are_prepared(tmp_path: Path, whole: bool) -> None:
    for size, fraction in ((160, 0.875), (32, 0)):
        run, out = tmp_path / str(size), tmp_path / f"{size}.safetensors"
        views = {**VIEWS, "size": size, "interpolation": "bicubic"}
        trained(run, EncoderOptions(name="resnet18"), steps=(1,), views=views)
        metadata = export(run, out, whole=whole, report=pytest.fail)
        expected = {**views, "central_fraction": fraction, "class_names": NAMES}
        assert {name: json.loads(metadata[name]) for name in expected} == expected


def test_a_damaged_newest_checkpoint_is_passed_over_and_reported(tmp_path: Path) -> None:
    trained(tmp_path, EncoderOptions.model_validate({"name": "resnet18"}))
    next((tmp_path / "checkpoints/step-00000080").glob("*.safetensors")).unlink()
    reports: list[str] = []
    assert export(tmp_path, tmp_path / "e.safetensors", report=reports.append)["step"] == "40"
    assert len(reports) == 1 and "rank-0000" in reports[0]


def test_refusals(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(run, EncoderOptions.model_validate({"name": "resnet18"}), steps=(1,))
    there = tmp_path / "there.safetensors"
    there.write_text("precious")
    (tmp_path / "step-00000001").mkdir()
    cases = {
        (run, there): "exists; choose another name, or replace it with --force",
        (run, tmp_path): "is a folder; name a file in it",
        (run, tmp_path / "e.pth"): "ends in '.pth'; only safetensors is written: .*e.safetensors",
        (run, tmp_path / "absent/e.safetensors"): "absent is no folder",
        (tmp_path / "nowhere", tmp_path / "e.safetensors"): "nowhere holds no checkpoint",
        (tmp_path / "step-00000001", tmp_path / "e.safetensors"): "checkpoint.json is missing",
    }
    for (source, out), message in cases.items():
        with pytest.raises(UserError, match=message):
            export(source, out, report=pytest.fail)
    assert there.read_text() == "precious" and not (tmp_path / "e.safetensors").exists()
    export(run, there, force=True, report=pytest.fail)
    assert "conv1.weight" in load_file(there)


def test_a_checkpoint_without_a_recipe_is_refused(tmp_path: Path) -> None:
    with Checkpoints(tmp_path, CheckpointOptions(), 0, 1) as checkpoints:
        checkpoints.save(3, {"w": Piece.of(torch.ones(2))}, {})
    with pytest.raises(UserError, match="says nothing of its recipe"):
        export(tmp_path, tmp_path / "e.safetensors", report=pytest.fail)
