"""PIRL: Misra, van der Maaten, 2020, arxiv.org/abs/1912.01991; authors' code: github.com/facebookresearch/vissl.

Eq. 5, m_I the row of image I in the memory bank, I^t its jigsaw, f and g the heads:
L(I, I^t) = lambda L_NCE(m_I, g(v_I^t)) + (1 - lambda) L_NCE(m_I, f(v_I)).
"""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn, stack

from kilobatch.data.augment.jigsaw import patches
from kilobatch.data.batch import Batch
from kilobatch.methods.method import Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import unit
from kilobatch.methods.papers.instance_discrimination import InstanceDiscrimination


class PIRL(InstanceDiscrimination):
    """An image and its shuffled patches both find the image's row in the memory bank: section 2.

    The first view is the image I, the second its jigsaw I^t: nine patches, which are encoded one by one and joined in
    their shuffled order. With data.views.second.by_patch each has a flip and colours of its own, as in the authors'
    code. pretext: lambda of eq. 5, the weight of the jigsaw's loss.

    The other options are those of methods/papers/instance_discrimination.py; the authors' code has the
    noise-contrastive form.
    """

    views: ClassVar[int | None] = 2
    jigsaw: ClassVar[bool] = True

    def __init__(
        self,
        encoder: Encoder,
        *,
        form: Literal["nce", "softmax"] = "nce",
        noise: Annotated[int, Field(gt=0)] = 32_000,
        temperature: Annotated[float, Field(gt=0)] = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
        pretext: Annotated[float, Field(ge=0, le=1)] = 0.5,
        dim: Annotated[int, Field(gt=0)] = 128,
    ) -> None:
        super().__init__(encoder, form=form, noise=noise, temperature=temperature, momentum=momentum, dim=dim)
        self.pretext = pretext
        self.patch_head = nn.Linear(encoder.features, dim)
        self.joined_head = nn.Linear(9 * dim, dim)

    def embed(self, batch: Batch) -> Tensors:
        image, jigsaw = batch.views[0].unbind(1)
        of_patches = self.patch_head(self.encoder(patches(jigsaw).flatten(0, 1)))  # (9 N, D)
        f, g = self.head(self.encoder(image)), self.joined_head(of_patches.view(len(image), -1))
        return {"v": unit(stack([f, g], 1))}  # (N, 2, D)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        image, jigsaw = self.contrast(z["v"], batch.index)
        return self.pretext * jigsaw + (1 - self.pretext) * image
