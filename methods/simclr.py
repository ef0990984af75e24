"""SimCLR: Chen et al. 2020, arxiv.org/abs/2002.05709; authors' code: github.com/google-research/simclr."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from data.batch import Batch
from methods.encoder import Encoder
from methods.heads import ProjectionHead
from methods.losses import nt_xent
from methods.method import Method, Tensors
from methods.operand_options import Operands


class SimCLR(Method):
    """Two views of an image attract each other, those of all other images of the global batch repel: section 2.1.

    dim: of the projections; hidden: of the head's hidden layer, the encoder's features if None. operands: of the loss's
    products, whose sums are fp32; halves are faster where there are units for them, and cost digits.
    """

    views: ClassVar[int | None] = 2

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        dim: Annotated[int, Field(gt=0)] = 128,
        hidden: Annotated[int, Field(gt=0)] | None = None,
        operands: Operands = "fp32",
    ) -> None:
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        self.operands: Operands = operands
        self.head = ProjectionHead(encoder.features, hidden or encoder.features, dim, encoder.norm)

    def embed(self, views: Tensor) -> Tensors:
        h = self.encoder(views.flatten(0, 1))  # both views in one batch, as the authors' norms see them
        return {"z": self.head(h).unflatten(0, views.shape[:2])}  # (N, V, D)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        z1, z2 = z["z"].unbind(1)
        return nt_xent(z1, z2, self.temperature, operands=self.operands)
