"""Vision transformers (Dosovitskiy et al. 2021, arxiv.org/abs/2010.11929) as MoCo v3 trains them (section 4).

They have torchvision's parameter names, and no classifier. Authors' code: github.com/facebookresearch/moco-v3, vits.py.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.options import Mode

PATCH = 16  # pixels, of both sides
EPSILON = 1e-6
SIZES = {"vit_small": (384, 12, 12), "vit_base": (768, 12, 12)}  # features, blocks, heads; MoCo v3's small has 12 heads


class ViT(Encoder):
    """Images (N, 3, S, S), S a multiple of 16 -> the class token (N, features) after the last block and norm.

    Positions are sines and cosines of row and column, and not trained. Nor is the patch embedding, which keeps its
    random weights: training it makes the training unstable (section 4.2). There is no BatchNorm; norm is for its heads.

    Raises UserError for images whose sides are no multiple of 16 or differ.
    """

    def __init__(self, features: int, blocks: int, heads: int, norm: Mode = "global") -> None:
        super().__init__()
        self.features, self.norm = features, norm
        self.conv_proj = nn.Conv2d(3, features, PATCH, PATCH).requires_grad_(False)
        self.class_token = nn.Parameter(torch.empty(1, 1, features))
        self.encoder = Trunk(features, blocks, heads)
        bound = math.sqrt(6 / (3 * PATCH**2 + features))
        nn.init.uniform_(self.conv_proj.weight, -bound, bound)
        nn.init.zeros_(self.get_parameter("conv_proj.bias"))
        nn.init.normal_(self.class_token, std=1e-6)

    def by_depth(self) -> list[tuple[str, ...]]:
        """The embedding and the blocks; not the last norm, which BEiT's and MAE's authors count to the head."""
        layers = self.encoder.layers
        return [("conv_proj", "class_token"), *((f"encoder.layers.{name}",) for name, _ in layers.named_children())]

    def forward(self, images: Tensor) -> Tensor:
        return self._tokens(images)[:, 0]

    def stages(self, images: Tensor) -> list[Tensor]:
        """One map, of the patches' tokens after the last block and norm: (N, features, S / 16, S / 16)."""
        side = images.shape[2] // PATCH
        return [self._tokens(images)[:, 1:].transpose(1, 2).unflatten(2, (side, side))]

    def _tokens(self, images: Tensor) -> Tensor:
        """(N, 1 + patches, features): the class token, then the patches row by row."""
        height, width = images.shape[2:]
        if height != width or height % PATCH:
            nearest_size = max(PATCH, round(height / PATCH) * PATCH)
            raise UserError(
                f"a vision transformer cuts square images into patches of {PATCH} x {PATCH} pixels, and these have "
                f"{height} x {width}; set data.views.size to a multiple of {PATCH}, such as {nearest_size}"
            )
        patches = self.conv_proj(images).flatten(2).transpose(1, 2)  # (N, patches, features), row by row
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1)
        return self.encoder(tokens + positions(height // PATCH, self.features, images.device), self.run)


class Trunk(nn.Module):
    def __init__(self, features: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            OrderedDict((f"encoder_layer_{i}", Block(features, heads)) for i in range(blocks)),
        )
        self.ln = nn.LayerNorm(features, EPSILON)

    def forward(self, tokens: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """run: computes a block."""
        for block in self.layers:
            tokens = run(block, tokens)
        return self.ln(tokens)


class Block(nn.Module):
    """Tokens (N, L, features) -> the same shape: attention and MLP, each after a norm and beside a shortcut."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(features, EPSILON)
        self.self_attention = nn.MultiheadAttention(features, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(features, EPSILON)
        # torchvision's layer 2 is a dropout
        layers = ("0", nn.Linear(features, 4 * features)), ("1", nn.GELU()), ("3", nn.Linear(4 * features, features))
        self.mlp = nn.Sequential(OrderedDict(layers))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        bound = math.sqrt(6 / (2 * features))  # Xavier's, of queries, keys and values separately
        nn.init.uniform_(self.self_attention.get_parameter("in_proj_weight"), -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


@cache
def positions(side: int, features: int, device: torch.device) -> Tensor:
    """The positions (1, 1 + side^2, features), float32: zeros for the class token, then for each patch, row by row,
    sines and cosines of its row and of its column at features / 4 frequencies from 1 down to 1 / 10000.
    """
    frequency = 10000.0 ** -(torch.arange(features // 4) / (features // 4))
    phase = torch.arange(side)[:, None] * frequency  # (side, features / 4)
    rows, columns = phase.repeat_interleave(side, 0), phase.repeat(side, 1)
    waves = torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], 1)
    return torch.cat([torch.zeros(1, features), waves])[None].to(device)


def torchvision_vit_state_dict(encoder: dict[str, Tensor], size: int, classes: int = 1000) -> dict[str, Tensor]:
    """The state dict of torchvision's VisionTransformer, from a ViT's, for images of this size: with the positions, and
    a classifier of zeros, since none has been trained. It loads strictly; no tensor is copied.
    """
    class_token = encoder["class_token"]
    features = class_token.shape[-1]
    pos_embedding = positions(size // PATCH, features, class_token.device).to(class_token.dtype)
    heads = {
        "heads.head.weight": class_token.new_zeros(classes, features),
        "heads.head.bias": class_token.new_zeros(classes),
    }
    return {**encoder, "encoder.pos_embedding": pos_embedding, **heads}
