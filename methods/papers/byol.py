"""BYOL: Grill et al. 2020, arxiv.org/abs/2006.07733; authors' code: google-deepmind/deepmind-research, byol.

Eq. 2: L = |q(z) - z'|^2 of unit vectors = 2 - 2 cos(q(z), z'), z of a view by the online network, z' of the other view
by the target network; eq. 1 and section 3.2: both views take both parts, and the two terms are added.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.cosine_regression import centre_and_residual, cosine_to
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder, rising
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import MLP


class BYOL(Method):
    """The online network predicts the target network's projection of the image's other view: section 3.1.

    momentum: of the target network, tau_base at the start, which rises to 1 by a cosine. dim: numbers of a projection;
    hidden: the width of the projector's and the predictor's hidden layer.

    A first linear layer has no bias here: the norm behind it takes it out. The authors' target starts from weights of
    its own, here as the online network; they saw no difference (README).
    """

    views: ClassVar[int | None] = 2

    def __init__(
        self,
        encoder: Encoder,
        *,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.996,
        dim: Annotated[int, Field(gt=0)] = 256,
        hidden: Annotated[int, Field(gt=0)] = 4096,
    ) -> None:
        super().__init__()
        self.encoder, self.momentum = encoder, momentum
        self.projector = MLP([encoder.features, hidden, dim], encoder.norm, last_norm=False)
        self.predictor = MLP([dim, hidden, dim], encoder.norm, last_norm=False)
        self.target_network = MomentumEncoder(self.online())
        self.last: tuple[Tensor, Tensor] | None = None  # of the last step: targets and predictions, for scalars()

    def online(self) -> nn.Module:
        return nn.Sequential(self.encoder, self.projector)

    def embed(self, batch: Batch) -> Tensors:
        network = nn.Sequential(self.encoder, self.projector, self.predictor)
        return {"p": torch.stack([network(view) for view in batch.views[0].unbind(1)], 1)}  # norms see one view

    def target(self, batch: Batch) -> Tensors:
        return {"z": torch.stack([self.target_network(view) for view in batch.views[0].unbind(1)], 1)}  # (N, V, D)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        p1, p2 = z["p"].unbind(1)
        z1, z2 = t["z"].unbind(1)
        return 4 - 2 * cosine_to(z2, p1) - 2 * cosine_to(z1, p2)

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        self.target_network.follow(self.online(), rising(self.momentum, batch.clock.after))
        self.last = t["z"], z["p"]

    def scalars(self) -> dict[str, float]:
        return centre_and_residual(*(x.flatten(0, 1) for x in self.last)) if self.last else {}
