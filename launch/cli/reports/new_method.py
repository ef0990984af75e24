"""`kilobatch new method NAME`: a commented file with a method of one's own, which trains and passes verify as it is."""

import re
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.data.files import refusing_os_errors, write_whole

START = '''\
"""CLASS: a method of your own. Say here which paper it is of, and where the authors' code is.

As it stands it is a small contrastive method: each first view finds the second view of its image among those of all
images of the global batch (InfoNCE, van den Oord et al. 2018, arxiv.org/abs/1807.03748).
"""

from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import ProjectionHead, unit


class CLASS(Method):
    """Each first view finds the second view of its image among those of the global batch.

    temperature: which similarities are divided by. dim: numbers of a projection.
    """

    # How many views of an image the recipe has to ask for; None: any number.
    views: ClassVar[int | None] = 2

    # The options of the recipe's section `method` are these arguments, each with a type, bounds and a default. They are
    # read without importing this file: types and defaults may come from the standard library and from pydantic.
    # `kilobatch options NAME.py:CLASS` prints them, with what the docstring above says of them.
    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.2,
        dim: Annotated[int, Field(gt=0)] = 64,
    ) -> None:
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        # Heads take the mode of the encoder's norms. A torch.nn.BatchNorm would depend on ranks and chunks.
        self.head = ProjectionHead(encoder.features, encoder.features, dim, encoder.norm)

    # Called chunk by chunk, and with several chunks twice. So it keeps no state and never detaches: a stop-gradient
    # stands in `loss`. The sample axis comes first in what it returns.
    def embed(self, batch: Batch) -> Tensors:
        views = batch.views[0]  # (n, 2, 3, H, W)
        h = self.encoder(views.flatten(0, 1))  # (2n, features)
        return {"z": self.head(h).unflatten(0, views.shape[:2])}  # (n, 2, dim)

    # The mean over this rank's own samples; the trainer averages gradients over ranks. What needs other ranks' samples
    # comes by `collectives`, whose gradients come back to the rank that made them. No rank or chunk appears.
    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        first, second = unit(z["z"]).unbind(1)  # (n, dim) each, of length 1
        every = collectives.gather(second)  # (n on all ranks, dim), in rank order
        own = collectives.local_rows(len(first), first.device)  # where this rank's rows stand in `every`
        return F.cross_entropy(first @ every.T / self.temperature, own)

    # Further places for what a paper may need, in kilobatch.methods.method: `target` and `update` (a momentum encoder,
    # a queue), `arrange` (mixed images), `before_epoch` (clusters), `groups` (other learning rates), `scalars` (numbers
    # to show beside the loss).
'''


def write_method(name: str, force: bool) -> Path:
    """Writes NAME.py in this folder. Raises UserError for a name that is none of Python's, and for a file that is
    there."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"'{name}' is no name of a file with a method; use small letters, digits and _, such as my_method"
        )
    path = Path(f"{name}.py")
    if path.exists() and not force:
        raise UserError(f"{path} exists; choose another name, or replace it with --force")
    cls = "".join(part.capitalize() for part in name.split("_"))
    with refusing_os_errors(path):
        write_whole(path, [START.replace("NAME", name).replace("CLASS", cls).encode()])
    print(
        f"wrote {path}. It trains as it is:\n"
        f"  kilobatch train demo method.name={path}:{cls}\n"
        f"  kilobatch verify {path}:{cls}     # on 1 to 4 ranks and in 1 to 4 chunks, against one process\n"
        f"  kilobatch options {path}:{cls}    # its options"
    )
    return path
