"""Encoders around networks of timm, of torchvision and of one's own: they are the library's networks with layers of
ours, and what depends on ranks or chunks is refused by name."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.errors import UserError
from kilobatch.data.tensor_rng import sample_keys
from kilobatch.methods import backbone_names
from kilobatch.methods.networks import batch_norm, keyed_layers
from kilobatch.methods.networks.backbones import libraries, probe
from kilobatch.methods.networks.backbones.adapt import NormAct
from kilobatch.methods.networks.backbones.backbone import Backbone
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import EncoderOptions

SIDE = 32
IMAGES = torch.randn(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def build(name: str, size: int = SIDE, checkpoint: bool = False, **options: Any) -> Backbone:
    torch.manual_seed(0)
    given = EncoderOptions(name=name, options=options or None, norm="local", checkpoint=checkpoint)
    encoder = build_encoder(given, [size])
    assert isinstance(encoder, Backbone)
    return encoder


@pytest.fixture(scope="module", autouse=True)
def no_weights() -> Any:
    """Nothing is ever fetched."""
    timm = pytest.importorskip("timm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: pytest.fail("weights are loaded"))
        yield


@pytest.mark.parametrize("name", [f"timm/test_{kind}" for kind in ("resnet", "efficientnet", "convnext", "vit")])
def test_it_is_timms_network(name: str) -> None:
    timm = pytest.importorskip("timm")
    encoder = build(name)
    theirs = timm.create_model(name.removeprefix("timm/"), num_classes=0, **_dynamic(name))
    theirs.load_state_dict(encoder.network.state_dict(), strict=True)
    for training in (True, False):
        ours, want = encoder.train(training)(IMAGES), theirs.train(training)(IMAGES)
        assert ours.shape == (4, encoder.features)
        assert_close(ours, want, rtol=1e-4, atol=1e-4)
        batch_norm.commit(encoder)
    assert_close(dict(encoder.network.state_dict()), dict(theirs.state_dict()), rtol=1e-4, atol=1e-5)


def _dynamic(name: str) -> dict[str, bool]:
    return {"dynamic_img_size": True} if "vit" in name else {}


def test_a_norm_of_timm_keeps_its_activation() -> None:
    norms = [m for m in build("timm/test_efficientnet").modules() if isinstance(m, NormAct)]
    assert {type(norm.act) for norm in norms} == {nn.SiLU, nn.Identity}  # the last norm of a branch has none
    assert norms[0](torch.randn(8, len(norms[0].weight), 4, 4)).min() > -0.3  # SiLU's least is -0.278


@pytest.mark.parametrize(
    ("name", "features", "maps"), [("torchvision/resnet18", 512, 4), ("torchvision/mobilenet_v3_small", 1024, 0)]
)
def test_it_is_torchvisions_network(name: str, features: int, maps: int) -> None:
    from torchvision import models

    encoder = build(name)
    assert encoder.features == features
    model = name.removeprefix("torchvision/")
    theirs: Any = models.get_model(model)
    missing = theirs.load_state_dict(encoder.network.state_dict(), strict=False)
    assert not missing.unexpected_keys and all("fc" in key or "classifier.3" in key for key in missing.missing_keys)
    last = theirs.fc if model == "resnet18" else theirs.classifier[3]
    assert_close(last(encoder.eval()(IMAGES)), theirs.eval()(IMAGES), rtol=1e-4, atol=1e-4)
    if maps:
        found = encoder.stages(IMAGES)
        assert [tuple(x.shape[1:]) for x in found] == [(64, 8, 8), (128, 4, 4), (256, 2, 2), (512, 1, 1)]
    else:
        with pytest.raises(UserError, match="MobileNetV3 says nothing of its maps"):
            encoder.stages(IMAGES)


def test_images_of_several_sizes() -> None:
    encoder = build("timm/test_vit").eval()
    for side in (32, 96):
        assert encoder(torch.randn(2, 3, side, side)).shape == (2, encoder.features)
    assert [tuple(x.shape[2:]) for x in encoder.stages(torch.randn(2, 3, 96, 96))] == [(6, 6)]
    assert [x.shape[2] for x in build("timm/test_convnext").stages(torch.randn(2, 3, 64, 64))] == [16, 8, 4, 2]
    with pytest.raises(UserError, match=r"does not take images of 40 x 40.*encoder.options.img_size"):
        build("timm/test_vit", 40)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("timm/test_convnext", {"drop_path_rate": 0.3}),
        ("timm/test_vit", {"proj_drop_rate": 0.1, "attn_drop_rate": 0.2}),
    ],
)
def test_blocks_computed_again_are_the_same_to_the_bit(name: str, options: dict[str, Any]) -> None:
    def outcome(checkpoint: bool) -> dict[str, Tensor]:
        encoder = build(name, checkpoint=checkpoint, **options)
        with keyed_layers.drawing(encoder, sample_keys(0, 0, torch.arange(4))):
            y = encoder(IMAGES)
        (y * torch.linspace(-1, 1, encoder.features)).sum().backward()
        assert len(keyed_layers.find(encoder)) > 1
        return {"y": y, **{key: p.grad for key, p in encoder.named_parameters() if p.grad is not None}}

    plain = outcome(False)
    assert plain["y"].abs().max() > 0
    assert_close(outcome(True), plain, rtol=0, atol=0)
    encoder = build(name, checkpoint=True)
    twin = copy.deepcopy(encoder)  # such as a momentum encoder
    twin(IMAGES).sum().backward()
    assert all(p.grad is None for p in encoder.parameters()) and any(p.grad is not None for p in twin.parameters())


def test_parts_by_depth() -> None:
    parts = build("timm/test_vit").by_depth()
    assert {"network.cls_token", "network.pos_embed", "network.patch_embed.proj.weight"} <= {*parts[0]}
    assert [part[0] for part in parts[1:]] == [f"network.blocks.{i}" for i in range(len(parts) - 1)]
    parts = build("timm/test_convnext").by_depth()
    assert any("downsample" in name for part in parts[2:] for name in part)  # with the block that follows
    assert not any("head" in name for part in parts for name in part)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm/test_vitt", {}, r"which timm does not have; did you mean 'timm/test_vit'\?"),
        ("timm/test_vit", {"drop_rat": 0.1}, r"encoder.options of timm/test_vit .*did you mean 'drop_rate'\?"),
        ("timm/test_resnet", {"drop_rate": 0.1}, "test_resnet draws from torch's generator in its forward"),
        ("torchvision/squeezenet1_0", {}, "ends in no linear classifier"),
        ("timm/test_vit", {"patch_drop_rate": 0.5}, "patch_drop is a PatchDropout, which draws"),
    ],
)
def test_what_a_library_does_not_have_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, **options)


def test_names_are_those_that_the_libraries_list() -> None:
    timm, models = pytest.importorskip("timm"), pytest.importorskip("torchvision.models")
    assert backbone_names.models("timm") == sorted(timm.list_models())
    assert backbone_names.models("torchvision") == sorted(models.list_models(module=models))


def test_an_absent_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone_names.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"package timm is not installed: pip install 'kilobatch\[timm\]'"):
        backbone_names.check_name("timm/test_vit")


OWN = """
import random

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(3, 8, 3)
        self.norm = {layer}
        self.register_buffer("seen", torch.zeros(1))
        {more}

    def forward(self, x):
        x = self.norm(self.conv(x))
        if self.kind == "batch":
            x = x - x.mean(0)
        if self.kind == "dropout":
            x = F.dropout(x, 0.1, self.training)
        if self.kind == "random":
            x = x * random.random()
        if self.kind == "state":
            self.seen += 1
        if self.kind == "order":
            x = self.drop(x.flip(0).unsqueeze(0)[0]).flip(0)
        if self.kind == "tuple":
            return x, x
        return x.flatten(2) if self.kind == "tokens" else x


class Own(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


def net(kind="plain"):
    return Net(kind)
"""


def own(folder: Path, layer: str = "nn.Identity()", more: str = "pass") -> str:
    file = folder / f"own{len(list(folder.iterdir()))}.py"
    file.write_text(OWN.replace("{layer}", layer).replace("{more}", more))
    return f"{file}:net"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("batch", "its features of an image depend on the other images of its chunk"),
        ("dropout", r"draws from torch's generator in its forward \(aten.bernoulli"),
        ("random", "its features of the same images differ from one forward to the next"),
        ("state", "changes its buffer seen in a forward"),
        ("tuple", r"makes tuple of 2 images.*should make features \(N, D\)"),
        ("tokens", r"makes \(2, 8, 900\) of 2 images"),
    ],
)
def test_what_its_forward_may_not_do(kind: str, message: str, tmp_path: Path) -> None:
    name = own(tmp_path)
    assert build(name).features == 8
    with pytest.raises(UserError, match=message):
        build(name, kind=kind)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("Own(8)", "layer norm is a Own, a BatchNorm with a forward of its own"),
        ("nn.BatchNorm2d(8, momentum=None)", "layer norm is a BatchNorm2d with momentum=None"),
        ("nn.BatchNorm2d(8, track_running_stats=False)", "track_running_stats=False; use a number and True"),
        ("nn.InstanceNorm2d(8, track_running_stats=True)", "layer norm is a InstanceNorm2d with track_running_stats"),
        ("nn.RReLU()", "layer norm is a RReLU, which draws from torch's generator"),
    ],
)
def test_layers_that_are_refused_by_name(layer: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        build(own(tmp_path, layer))


def test_refusals_of_a_file(tmp_path: Path) -> None:
    name = own(tmp_path, more="self.scale = nn.Parameter(torch.tensor(1.0))")
    with pytest.raises(UserError, match=r"parameter scale has no dimensions.*shape \(1,\)"):
        build(name)
    with pytest.raises(UserError, match=r"do not fit .*unexpected keyword argument 'sort'.*its arguments: kind"):
        build(name, sort=1)
    with pytest.raises(UserError, match=r"defines no function 'nett'; did you mean 'net'\?"):
        build(f"{name}t")
    with pytest.raises(UserError, match=r"there is no file .*gone.py"):
        build(f"{tmp_path}/gone.py:net")
    (tmp_path / "number.py").write_text("def net():\n    return 3\n")
    with pytest.raises(UserError, match="returns a int; it should return an nn.Module"):
        build(f"{tmp_path}/number.py:net")


def test_a_large_network_is_probed_without_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    with_numbers = build("timm/test_resnet")
    monkeypatch.setattr(probe, "LARGEST_RUN", 0)
    monkeypatch.setattr(probe, "refuse_mixed", lambda *_: pytest.fail("it is too large"))
    assert build("timm/test_resnet").features == with_numbers.features
    with pytest.raises(UserError, match="draws from torch's generator"):
        build("timm/test_resnet", drop_rate=0.1)


def test_sizes_by_default() -> None:
    assert libraries.default_size(build("timm/test_vit").network, {}) == 160
    assert libraries.default_size(nn.Identity(), {"image_size": 48}) == 48
    assert build_encoder(EncoderOptions(name="timm/test_vit")).features == 64
