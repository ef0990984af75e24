"""Blocks that are computed again in the backward, and the maps of stages."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kilobatch.data.errors import UserError
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks import vit as module_vit
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.networks.resnet import ResNet
from kilobatch.methods.networks.vit import ViT
from kilobatch.trainer.costs.memory_probe import cost

CPU = torch.device("cpu")
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "resnet18": ({"name": "resnet18", "norm": "local"}, 32),
    "selective kernels": ({"name": "resnet50", "norm": "local", "sk_ratio": 0.0625}, 32),
}


def encoder(options: dict[str, Any], checkpoint: bool) -> Encoder:
    torch.manual_seed(0)
    return build_encoder(EncoderOptions.model_validate({**options, "checkpoint": checkpoint}))


def vit(recomputes: bool) -> ViT:
    torch.manual_seed(0)
    made = ViT(32, 3, 4)
    made.recomputes = recomputes
    return made


def outcome(of: Encoder, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Output, gradients and running statistics."""
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = of(x)
    (y.float() * torch.linspace(-1, 1, of.features)).sum().backward()
    batch_norm.commit(of)
    gradients = {name: p.grad for name, p in of.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **gradients, **dict(of.named_buffers())}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_resnet_computed_again_is_the_same_to_the_bit(name: str) -> None:
    options, side = NETWORKS[name]
    x = torch.randn(4, 3, side, side)
    assert_close(outcome(encoder(options, True), x), outcome(encoder(options, False), x), rtol=0, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_vit_computed_again_is_the_same_to_the_bit(autocast: bool) -> None:
    x = torch.randn(4, 3, 32, 32)
    plain = outcome(vit(False), x, autocast)
    assert plain["class_token"].abs().max() > 0
    assert_close(outcome(vit(True), x, autocast), plain, rtol=0, atol=0)


def test_it_takes_less_memory() -> None:
    def held(recomputes: bool) -> tuple[int, int]:
        of, x = vit(recomputes), torch.randn(8, 3, 64, 64)
        return cost(lambda: of(x), lambda y: torch.autograd.grad(y.sum(), [*of.encoder.parameters()]), CPU)

    plain, again = held(False), held(True)
    assert again[0] < plain[0] / 4 and again[1] < plain[1] / 1.5


def test_checkpoint_is_for_networks_of_blocks() -> None:
    with pytest.raises(ValueError, match="convnet: it has no blocks"):
        EncoderOptions(name="convnet", checkpoint=True)


def test_maps_of_a_resnets_stages() -> None:
    x = torch.randn(2, 3, 64, 64)
    for recomputes in (False, True):
        made = encoder({"name": "resnet18", "norm": "local"}, recomputes)
        maps = made.stages(x)
        assert [tuple(m.shape) for m in maps] == [(2, 64, 16, 16), (2, 128, 8, 8), (2, 256, 4, 4), (2, 512, 2, 2)]
        assert torch.equal(maps[-1].mean((2, 3)), made(x))
    cifar = ResNet("resnet50", "cifar", "local", width=2)
    sizes = [tuple(m.shape) for m in cifar.stages(torch.randn(2, 3, 8, 8))]
    assert sizes == [(2, 512, 8, 8), (2, 1024, 4, 4), (2, 2048, 2, 2), (2, 4096, 1, 1)]


def test_maps_of_a_convnet_and_of_a_vit() -> None:
    small = build_encoder(EncoderOptions(name="convnet", norm="local", width=4))
    x = torch.randn(2, 3, 32, 32)
    maps = small.stages(x)
    assert [tuple(m.shape) for m in maps] == [(2, 4, 32, 32), (2, 8, 16, 16), (2, 16, 8, 8), (2, 32, 4, 4)]
    assert torch.equal(maps[-1].mean((2, 3)), small(x))

    of = vit(False)
    (tokens,) = of.stages(x)
    assert tokens.shape == (2, 32, 2, 2)
    with mock.patch.object(module_vit, "positions", lambda side, features, device: torch.zeros(1, 5, features)):
        (tokens,) = of.stages(x)
        (mirrored,) = of.stages(x.unflatten(3, (2, 16)).flip(3).flatten(3))  # left and right patches change places
    assert_close(mirrored.flip(3), tokens)  # without positions, so do their tokens
    assert not torch.allclose(mirrored, tokens)


def test_a_network_without_maps_refuses_by_name() -> None:
    class Flat(Encoder):
        pass

    with pytest.raises(UserError, match="Flat has no maps"):
        Flat().stages(torch.zeros(1, 3, 8, 8))
