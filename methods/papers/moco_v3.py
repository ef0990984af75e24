"""MoCo v3: Chen, Xie, He, 2021, arxiv.org/abs/2104.02057; authors' code: github.com/facebookresearch/moco-v3.

Eq. 1, k+ the key of the image's other view, k- the other keys of the batch:
L_q = -log( exp(q k+ / tau) / (exp(q k+ / tau) + sum over k- of exp(q k- / tau)) ); algorithm 1: ctr = 2 tau L_q.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.contrastive import batch_info_nce
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder, rising
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import MLP, unit


class MoCoV3(Method):
    """A query finds the key of the image's other view among the keys of the global batch: algorithm 1.

    temperature: tau, which similarities are divided by; momentum: of the momentum encoder, m at the start, which rises
    to 1 by a cosine. dim: numbers of a projection; hidden: the width of the projector's and the predictor's hidden
    layers; layers: of the projector, whose last norm has no parameters; predictor_norm: whether the predictor ends in
    such a norm, too.

    The authors' ResNets have 2 layers,
    temperature 1 and a predictor that ends in a linear layer, their ViTs 3 layers, temperature 0.2 and predictor_norm.
    """

    views: ClassVar[int | None] = 2

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.99,
        dim: Annotated[int, Field(gt=0)] = 256,
        hidden: Annotated[int, Field(gt=0)] = 4096,
        layers: Annotated[int, Field(ge=1)] = 2,
        predictor_norm: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.temperature, self.momentum = encoder, temperature, momentum
        self.projector = MLP([encoder.features, *[hidden] * (layers - 1), dim], encoder.norm)
        self.predictor = MLP([dim, hidden, dim], encoder.norm, last_norm=predictor_norm)
        self.momentum_encoder = MomentumEncoder(self.online())

    def online(self) -> nn.Module:
        return nn.Sequential(self.encoder, self.projector)

    def embed(self, batch: Batch) -> Tensors:
        network = nn.Sequential(self.encoder, self.projector, self.predictor)
        views = batch.views[0].unbind(1)
        return {"q": torch.stack([network(view) for view in views], 1)}  # (N, V, D); norms see one view

    def target(self, batch: Batch) -> Tensors:
        return {"k": torch.stack([self.momentum_encoder(view) for view in batch.views[0].unbind(1)], 1)}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        q1, q2 = unit(z["q"]).unbind(1)
        k1, k2 = unit(t["k"]).unbind(1)
        return ctr(q1, k2, self.temperature) + ctr(q2, k1, self.temperature)

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        self.momentum_encoder.follow(self.online(), rising(self.momentum, batch.clock.after))


def ctr(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """The mean over queries of eq. 1 times 2 * temperature. q, k (n, D): this rank's unit queries and their keys."""
    return 2 * temperature * batch_info_nce(q, k, temperature)
