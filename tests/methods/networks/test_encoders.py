import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import nn
from torch.testing import assert_close

from kilobatch.data.batch import make_batch
from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import OWN_NAMES, EncoderOptions
from kilobatch.methods.networks.resnet import LAYERS, torchvision_state_dict
from kilobatch.methods.networks.vit import SIZES
from kilobatch.methods.papers.simclr import SimCLR


@pytest.mark.parametrize("name", LAYERS)
def test_resnets_load_strictly_into_torchvisions_and_agree(name: str) -> None:
    torch.manual_seed(0)
    ours = build_encoder(EncoderOptions.model_validate({"name": name, "zero_init": False}))
    for module in ours.modules():
        if isinstance(module, BatchNorm):  # else depth alone would blow the numbers up
            nn.init.uniform_(module.running_var, 1.5, 2.5)
            nn.init.normal_(module.running_mean, std=0.1)
    theirs = torchvision.models.get_model(name)
    theirs.load_state_dict(torchvision_state_dict(ours.state_dict()), strict=True)
    assert not theirs.get_parameter("fc.weight").any() and not theirs.get_parameter("fc.bias").any()
    theirs.set_submodule("fc", nn.Identity())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        got, want = ours.eval()(x), theirs.eval()(x)
    assert got.shape == (2, ours.features) and want.std() > 1e-3
    assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_cifar_stem_keeps_the_side() -> None:
    encoder = build_encoder(EncoderOptions(name="resnet18", stem="cifar", norm="local", zero_init=True))
    seen: list[torch.Size] = []
    encoder.get_submodule("layer1").register_forward_hook(lambda m, args, out: seen.append(out.shape))
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, 512)
    assert seen == [(2, 64, 32, 32)]


def test_zero_init_starts_blocks_as_the_identity() -> None:
    for zero_init in (True, False):
        encoder = build_encoder(EncoderOptions(name="resnet50", stem="imagenet", norm="local", zero_init=zero_init))
        zeros = [n for n, p in encoder.named_parameters() if n.endswith("weight") and not p.any()]
        assert len(zeros) == (16 if zero_init else 0)
        assert all(name.endswith("bn3.weight") for name in zeros)


@pytest.mark.parametrize("width", [4, None])
def test_convnet(width: int | None) -> None:
    encoder = build_encoder(EncoderOptions(name="convnet", stem="imagenet", norm="local", zero_init=True, width=width))
    assert encoder(torch.randn(2, 3, 32, 32)).shape == (2, encoder.features) == (2, 8 * (width or 16))
    assert sum(isinstance(m, nn.Conv2d) for m in encoder.modules()) == 6


def test_width_is_in_channels_for_convnets_and_a_factor_for_resnets() -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderOptions(name="resnet34", width=2))
    assert encoder.features == 1024 and encoder.get_parameter("conv1.weight").shape == (128, 3, 7, 7)
    for wrong in ({"name": "resnet18", "width": 16}, {"name": "vit_small", "width": 2}):
        with pytest.raises(ValidationError, match=f"width {wrong['width']} for {wrong['name']}"):
            EncoderOptions.model_validate(wrong)


def test_the_options_name_every_encoder() -> None:
    assert {*OWN_NAMES} == {*LAYERS, *SIZES, "convnet"}


@pytest.mark.parametrize("mode", ["global", "local"])
def test_simclr_head_follows_the_encoders_norm(mode: str) -> None:
    encoder = build_encoder(EncoderOptions.model_validate({"name": "convnet", "width": 4, "norm": mode}))
    method = SimCLR(encoder, dim=7, hidden=11)
    z = method.embed(make_batch(torch.randn(5, 2, 3, 16, 16)))["z"]
    assert z.shape == (5, 2, 7)
    assert {m.mode for m in method.modules() if isinstance(m, BatchNorm)} == {mode}
