"""SimCLRv2: Chen et al. 2020, arxiv.org/abs/2006.10029, section 2; authors' code: github.com/google-research/simclr."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.contrastive import nt_xent
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import ProjectionHead, unit
from kilobatch.methods.options import Operands


class SimCLRV2(Method):
    """SimCLR's loss (eq. 1) on a deeper projection head, whose first layer fine-tuning keeps; optionally with a memory.

    temperature: tau, which similarities are divided by. dim: numbers of a projection; layers: of the projection head;
    hidden: the width of the head but for its last layer; null: the encoder's features. operands: the type of the loss's
    products, whose sums are fp32. queue: keys of a memory network, which are further negatives; null: no memory.
    momentum: of the memory network, the moving average of encoder and head.

    Section 2 does not give the memory's form, and the authors' code has none. Here an anchor i, any view of the
    global batch, has the loss -log( e^s_ip / (sum over the batch's other views k of e^s_ik + sum over the queue's keys
    j of e^s_ij) ), s a cosine over the temperature, p its other view; and after each step one key of each image enters
    the queue, the memory network's output for its second view.
    """

    views: ClassVar[int | None] = 2
    head_layers: ClassVar[int | str] = "layers"

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        dim: Annotated[int, Field(gt=0)] = 128,
        layers: Annotated[int, Field(gt=0)] = 3,
        hidden: Annotated[int, Field(gt=0)] | None = None,
        queue: QueueOptions | None = None,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.999,
        operands: Operands = "fp32",
    ) -> None:
        super().__init__()
        self.encoder, self.temperature, self.momentum = encoder, temperature, momentum
        self.operands: Operands = operands
        self.head = ProjectionHead(encoder.features, hidden or encoder.features, dim, encoder.norm, layers)
        self.queue = Queue(queue, dim) if queue else None
        self.momentum_encoder = MomentumEncoder(self.online()) if queue else None

    def online(self) -> nn.Module:
        return nn.Sequential(self.encoder, self.head)

    def embed(self, batch: Batch) -> Tensors:
        views = batch.views[0]
        h = self.encoder(views.flatten(0, 1))  # h = f(x), both views in one batch, as the authors' norms see them
        return {"z": self.head(h).unflatten(0, views.shape[:2])}  # z = g(h), (N, V, D)

    def target(self, batch: Batch) -> Tensors:
        return {"key": unit(self.momentum_encoder(batch.views[0][:, 1]))} if self.momentum_encoder else {}  # (N, D)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        z1, z2 = z["z"].unbind(1)
        return nt_xent(z1, z2, self.temperature, self.queue, self.operands)

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        if self.queue and self.momentum_encoder:
            self.momentum_encoder.follow(self.online(), self.momentum)
            self.queue.push(t["key"])
