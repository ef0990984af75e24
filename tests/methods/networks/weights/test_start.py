"""Starting weights that fit in part or not at all; files that are damaged, or could run code."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.resnet import LAYERS, Basic, ResNet
from kilobatch.methods.networks.vit import ViT
from kilobatch.methods.networks.weights.start import resize_positions, start_encoder
from kilobatch.methods.networks.weights.state_file import read_places


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, depths in (("resnet10", (1, 1, 1, 1)), ("resnet14", (1, 2, 2, 1))):
        monkeypatch.setitem(LAYERS, name, (Basic, depths))


def started(encoder: nn.Module, state: dict[str, Tensor], least: float = 0.9, prefix: str | None = None):
    return start_encoder(encoder, {"": state}, [], least, prefix)


def test_another_stem_stays_random_and_is_named() -> None:
    source, encoder = ResNet("resnet10"), ResNet("resnet10", "cifar")
    stem = encoder.conv1.get_parameter("weight").clone()
    report = started(encoder, source.state_dict())
    assert report.missing == ["conv1.weight (64x3x7x7 there, 64x3x3x3 here)"] and 0.99 < report.share < 1
    assert torch.equal(encoder.conv1.get_parameter("weight"), stem)
    assert torch.equal(encoder.state_dict()["layer4.0.conv2.weight"], source.state_dict()["layer4.0.conv2.weight"])
    assert "missing 1 (conv1.weight (64x3x7x7 there, 64x3x3x3 here))" in str(report)


def test_too_little_is_refused_and_changes_nothing() -> None:
    encoder, shallower = ResNet("resnet14"), ResNet("resnet10").state_dict()
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    with pytest.raises(UserError, match=r"only 76\.\d % of the encoder's parameters .*start_share is 90 %.*=0.76"):
        started(encoder, shallower)
    assert all(torch.equal(x, before[name]) for name, x in encoder.state_dict().items())
    assert 0.76 < started(encoder, shallower, 0.75).share < 0.77
    with pytest.raises(UserError, match=r"only 76\.\d % of its encoder would be used .* of a deeper network"):
        started(ResNet("resnet10"), encoder.state_dict())
    with pytest.raises(UserError, match=r"it holds 36 tensors, such as 'convs.0.weight'; the encoder needs 30"):
        started(ConvNet(2), ConvNet(4).state_dict())


def test_an_encoder_that_is_there_twice_is_asked_for() -> None:
    source, encoder = ConvNet(2), ConvNet(2)
    state = {f"a.net.{name}": x for name, x in source.state_dict().items()}
    state |= {f"b.net.{name}": x + 1 for name, x in source.state_dict().items()}
    with pytest.raises(
        UserError, match=r"2 times, at 'a.net.' and 'b.net.'; choose one by encoder.start_prefix=a.net."
    ):
        started(encoder, state)
    started(encoder, state, prefix="b.net.")
    assert torch.equal(encoder.state_dict()["convs.0.weight"], source.state_dict()["convs.0.weight"] + 1)
    with pytest.raises(UserError, match="none below 'c.net.'"):
        started(encoder, state, prefix="c.net.")


def test_a_network_inside_of_another_module() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = ConvNet(2)

    encoder, source = Wrapped(), ConvNet(2)
    started(encoder, source.state_dict())
    assert all(
        torch.equal(x, source.state_dict()[n]) for n, x in encoder.network.state_dict().items() if "num" not in n
    )


def test_values_that_are_not_finite_are_refused() -> None:
    state = ConvNet(2).state_dict()
    state["norms.1.running_var"][0] = torch.nan
    with pytest.raises(UserError, match="norms.1.running_var has values that are not finite"):
        started(ConvNet(2), state)


def test_learnt_positions_are_refused_by_a_vit_with_fixed_ones() -> None:
    state = ViT(24, 1, 2).state_dict() | {"encoder.pos_embedding": torch.randn(1, 5, 24)}
    with pytest.raises(UserError, match=r"'encoder.pos_embedding' are learnt positions.*timm/NAME"):
        started(ViT(24, 1, 2), state)


def test_learnt_positions_are_resized_to_the_grid_as_timm_does() -> None:
    class Learnt(nn.Module):
        def __init__(self, side: int) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.randn(1, 1 + side**2, 6))
            self.head = nn.Linear(6, 40)

    old, new = Learnt(7), Learnt(4)
    report = started(new, old.state_dict())
    assert report.resized == ["pos_embed"] and "resized to this grid of patches 1 (pos_embed)" in str(report)
    assert torch.equal(new.pos_embed[:, 0], old.pos_embed[:, 0])
    grid = old.pos_embed[:, 1:].detach().unflatten(1, (7, 7)).permute(0, 3, 1, 2)
    expected = nn.functional.interpolate(grid, (4, 4), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert torch.equal(new.pos_embed[:, 1:], expected)
    with pytest.raises(UserError, match="no square grids"):
        resize_positions(torch.zeros(1, 11, 6), torch.Size((1, 17, 6)))
    timm: Any = pytest.importorskip("timm.layers", reason="timm is not installed: its resizing is not compared")
    torch.testing.assert_close(timm.resample_abs_pos_embed(old.pos_embed, [4, 4]), new.pos_embed)


class Runs:
    """A class of a package that is not there: to load its object would call something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of the file was run",)


def test_no_code_of_a_file_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"state_dict": ConvNet(2).state_dict(), "config": Runs()}
    for zipped in (True, False):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=r"holds objects of (builtins.)?print beside tensors.*write its weights"):
            read_places(tmp_path / "a.pth")
    torch.save(ConvNet(2), tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"objects of .*methods.networks.convnet.ConvNet.*x.state_dict\(\)"):
        read_places(tmp_path / "module.pth")
    assert "was run" not in capsys.readouterr().out


def test_damaged_and_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.pth"
    torch.save(ConvNet(2).state_dict(), file)
    whole = file.read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], b"# text\n", pickle.dumps([1, 2], 2)[:-3], b"\x80\x02}"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="no whole file of weights|no file of torch.save|holds no named tensors"):
            read_places(file)
    torch.save({"epoch": 3, "optimizer": {"state": {"x": torch.ones(2)}}}, file)
    with pytest.raises(UserError, match=r"holds no named tensors \(keys epoch, optimizer\)"):
        read_places(file)
    save_file({"x": torch.ones(2)}, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:-1])
    with pytest.raises(UserError, match="no whole .safetensors file"):
        read_places(tmp_path / "b.safetensors")


def test_statistics_of_norms_come_along() -> None:
    source, encoder = ConvNet(2), ConvNet(2)
    for norm in source.norms:
        assert isinstance(norm, BatchNorm)
        norm.running_var.fill_(7)
    report = started(encoder, source.state_dict())
    assert report.tensors == 30 and all(int(x) == 7 for x in encoder.state_dict()["norms.3.running_var"])
