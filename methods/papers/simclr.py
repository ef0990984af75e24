"""SimCLR: Chen et al. 2020, arxiv.org/abs/2002.05709; authors' code: github.com/google-research/simclr.

Eq. 1, for the views i and j of an image, among the 2N views of a batch of N images:
l_ij = -log( exp(sim(z_i, z_j) / tau) / sum over k != i of exp(sim(z_i, z_k) / tau) ), sim the cosine of two vectors.
"""

from collections.abc import Sequence
from math import log
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.contrastive import clip_loss, nt_xent
from kilobatch.methods.losses.options import LARGEST_SCALE, LearnTemperature, refuse_small_temperature
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import ProjectionHead
from kilobatch.methods.options import Operands
from kilobatch.methods.parameter_groups import ParameterGroup


class SimCLR(Method):
    """Each view finds the other view of its image among all views of the global batch: section 2.1, algorithm 1.

    temperature: tau, which similarities are divided by. dim: numbers of a projection z; layers: of the projection head,
    the paper's 2, or 3 as the authors' commands have it; hidden: the width of the head but for its last layer; null:
    the encoder's features. operands: the type of the loss's products, whose sums are fp32; halves are faster on units
    that have them, and cost digits. loss: nt_xent is eq. 1; clip is CLIP's (Radford et al. 2021,
    arxiv.org/abs/2103.00020), in which a first view is compared with second views alone, and the reverse.
    learn_temperature: whether the temperature is trained, from its value on, as log(1 / tau) without decay.

    The loss is eq. 1's mean over the 2N views, half of the authors' code's, which adds the means over first and second
    views (objective.py, loss_a + loss_b). LARS makes up for it but in biases and norms, which move half as far as
    theirs; on digits that was within the noise.

    CLIP clips a learnt temperature after the step, which ZeRO's master weights would not take over; here the loss reads
    a clipped value, and the gradient goes through to the parameter.
    """

    views: ClassVar[int | None] = 2
    head_layers: ClassVar[int | str] = "layers"
    pairwise: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        learn_temperature: LearnTemperature = False,
        loss: Literal["nt_xent", "clip"] = "nt_xent",
        dim: Annotated[int, Field(gt=0)] = 128,
        layers: Annotated[int, Field(gt=0)] = 2,
        hidden: Annotated[int, Field(gt=0)] | None = None,
        operands: Operands = "fp32",
    ) -> None:
        super().__init__()
        self.encoder, self.fixed_temperature = encoder, temperature
        self.loss_function = {"nt_xent": nt_xent, "clip": clip_loss}[loss]
        self.operands: Operands = operands
        self.head = ProjectionHead(encoder.features, hidden or encoder.features, dim, encoder.norm, layers)
        if learn_temperature:
            refuse_small_temperature(temperature)
        self.log_scale = nn.Parameter(torch.tensor([-log(temperature)])) if learn_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        if self.log_scale is None:
            return self.fixed_temperature
        log_scale = self.log_scale[0]
        excess = (log_scale - log(LARGEST_SCALE)).clamp(min=0).detach()  # clamp itself has no gradient there
        return (excess - log_scale).exp()

    def groups(self) -> Sequence[ParameterGroup]:
        return [] if self.log_scale is None else [ParameterGroup("log_scale", decay=0.0)]

    def embed(self, batch: Batch) -> Tensors:
        views = batch.views[0]
        h = self.encoder(views.flatten(0, 1))  # h = f(x), both views in one batch, as the authors' norms see them
        return {"z": self.head(h).unflatten(0, views.shape[:2])}  # z = g(h), (N, V, D)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        z1, z2 = z["z"].unbind(1)
        return self.loss_function(z1, z2, self.temperature, operands=self.operands)

    def scalars(self) -> dict[str, float]:
        temperature = self.temperature
        return {"temperature": temperature.item()} if isinstance(temperature, Tensor) else {}
