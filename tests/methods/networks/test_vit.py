import math

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.errors import UserError
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder
from kilobatch.methods.networks.batch_norm import norms
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.networks.vit import PATCH, SIZES, ViT, positions, torchvision_vit_state_dict


@pytest.mark.parametrize("side", [32, 96])
def test_loads_strictly_into_torchvisions_and_agrees(side: int) -> None:
    torch.manual_seed(0)
    ours = ViT(48, 3, 6).eval()
    for p in ours.parameters():
        nn.init.normal_(p, std=0.1)
    theirs = torchvision.models.VisionTransformer(side, PATCH, 3, 6, 48, 4 * 48).eval()
    theirs.load_state_dict(torchvision_vit_state_dict(ours.state_dict(), side), strict=True)
    theirs.heads = nn.Sequential()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        got, want = ours(images), theirs(images)
    assert got.shape == (2, ours.features) and got.std() > 0.01
    assert_close(got, want, rtol=1e-4, atol=1e-4)


def authors_positions(side: int, embed_dim: int) -> Tensor:
    """vits.py of facebookresearch/moco-v3, build_2d_sincos_position_embedding."""
    grid_w, grid_h = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    pos_dim = embed_dim // 4
    omega = 1.0 / (10000.0 ** (torch.arange(float(pos_dim)) / pos_dim))
    out_w = torch.einsum("m,d->md", [grid_w.flatten(), omega])
    out_h = torch.einsum("m,d->md", [grid_h.flatten(), omega])
    pos_emb = torch.cat([torch.sin(out_w), torch.cos(out_w), torch.sin(out_h), torch.cos(out_h)], dim=1)[None, :, :]
    return torch.cat([torch.zeros(1, 1, embed_dim), pos_emb], dim=1)


def test_positions_are_the_authors() -> None:
    assert_close(positions(14, 384, torch.device("cpu")), authors_positions(14, 384))


@pytest.mark.parametrize(("name", "millions"), [("vit_small", 21.6), ("vit_base", 85.6)])
def test_sizes(name: str, millions: float) -> None:
    """Without the positions and the classifier; torchvision's ViT-B has 86.6 with 0.15 and 0.77 of them."""
    encoder = build_encoder(EncoderOptions.model_validate({"name": name}))
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert encoder.features == SIZES[name][0] and not norms(encoder)
    assert encoder.get_submodule("encoder.layers.encoder_layer_0.self_attention").num_heads == 12


def test_the_patch_embedding_is_random_and_not_trained() -> None:
    torch.manual_seed(0)
    encoder = ViT(48, 1, 6)
    encoder(torch.randn(2, 3, 32, 32)).square().sum().backward()
    ungraded = {name for name, p in encoder.named_parameters() if p.grad is None}
    assert ungraded == {"conv_proj.weight", "conv_proj.bias"}
    assert all(not p.requires_grad for p in encoder.conv_proj.parameters())
    bound = math.sqrt(6 / (3 * PATCH**2 + 48))
    assert 0.99 * bound < encoder.conv_proj.weight.abs().max() <= bound
    bound = math.sqrt(6 / (2 * 48))
    attention = encoder.get_parameter("encoder.layers.encoder_layer_0.self_attention.in_proj_weight")
    assert 0.99 * bound < attention.abs().max() <= bound
    biases = [p for name, p in encoder.named_parameters() if name.endswith("bias")]
    assert not any(p.any() for p in biases)


def test_a_momentum_encoder_follows_a_vit() -> None:
    encoder = ViT(48, 1, 6)
    follower = MomentumEncoder(encoder)
    nn.init.ones_(encoder.class_token)
    follower.follow(encoder, 0.5)
    assert_close(follower.get_parameter("network.class_token"), torch.full((1, 1, 48), 0.5), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 40), (32, 48), (8, 8)])
def test_images_that_are_no_squares_of_patches_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=f"{shape[0]} x {shape[1]}; set data.views.size to a multiple of 16, such as"):
        ViT(48, 1, 6)(torch.randn(1, 3, *shape))
