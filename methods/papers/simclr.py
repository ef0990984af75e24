"""SimCLR: Chen et al. 2020, arxiv.org/abs/2002.05709; authors' code: github.com/google-research/simclr."""

from math import log
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.contrastive import clip_loss, nt_xent
from kilobatch.methods.losses.options import LARGEST_SCALE, Learnt, refuse_beyond
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import ProjectionHead
from kilobatch.methods.options import Operands


class SimCLR(Method):
    """Two views of an image attract each other, those of all other images of the global batch repel: section 2.1.

    dim: of the projections; hidden: of the head's hidden layer, the encoder's features if None. operands: of the loss's
    products, whose sums are fp32; halves are faster where there are units for them, and cost digits.

    loss: clip is CLIP's (Radford et al. 2021, arxiv.org/abs/2103.00020), where a view meets the other views alone.
    learn_temperature: begins at `temperature` and trains its negative logarithm, without decay. CLIP cuts that off
    after the step, where ZeRO's masters would not see it; here the loss sees it cut off, and its gradient passes.
    """

    views: ClassVar[int | None] = 2
    head_layers: ClassVar[int | str] = 2

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        learn_temperature: Learnt = False,
        loss: Literal["nt_xent", "clip"] = "nt_xent",
        dim: Annotated[int, Field(gt=0)] = 128,
        hidden: Annotated[int, Field(gt=0)] | None = None,
        operands: Operands = "fp32",
    ) -> None:
        super().__init__()
        self.encoder, self.fixed = encoder, temperature
        self.equation = {"nt_xent": nt_xent, "clip": clip_loss}[loss]
        self.operands: Operands = operands
        self.head = ProjectionHead(encoder.features, hidden or encoder.features, dim, encoder.norm)
        if learn_temperature:
            refuse_beyond(temperature)
        self.log_scale = nn.Parameter(torch.tensor([-log(temperature)])) if learn_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        if self.log_scale is None:
            return self.fixed
        scale = self.log_scale[0]
        beyond = (scale - log(LARGEST_SCALE)).clamp(min=0).detach()  # torch's clamp would end the gradient, for ever
        return (beyond - scale).exp()

    def embed(self, views: Tensor) -> Tensors:
        h = self.encoder(views.flatten(0, 1))  # both views in one batch, as the authors' norms see them
        return {"z": self.head(h).unflatten(0, views.shape[:2])}  # (N, V, D)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        z1, z2 = z["z"].unbind(1)
        return self.equation(z1, z2, self.temperature, operands=self.operands)

    def scalars(self) -> dict[str, float]:
        temperature = self.temperature
        return {"temperature": temperature.item()} if isinstance(temperature, Tensor) else {}
