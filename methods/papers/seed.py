"""SEED, distillation without classes: Fang et al. 2021, arxiv.org/abs/2101.04731.

Authors' code: github.com/jacobswan1/SEED. Eq. 4 to 6, with d_j the teacher's keys of a queue and of the image itself:
L = -sum_j p_T(j) log p_S(j), p_T = softmax(z_T d / tau_T), p_S = softmax(z_S d / tau_S).
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.data.errors import UserError
from kilobatch.methods.losses.distillation import similarity_distillation
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.method import LoadMethod, Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import unit
from kilobatch.methods.networks.teacher import FeatureTeacher
from kilobatch.methods.options import Operands, TeacherPrecision, WeightsReference

QUEUE = QueueOptions()  # 65,536 keys


class SEED(Method):
    """A student compares an image with the keys of a queue as its teacher does, which needs no classes: section 3.

    teacher: the encoder that teaches: a run, a checkpoint, an exported file, or a file of another package.
    further_teachers: their features stand beside the first one's, so that similarities are the mean. teacher_network:
    encoder.name of a file of another package; null: found by its tensors, for a ResNet, a ViT or convnet of ours. dim:
    the teachers' features, all together; what the student's head makes. by: similarity is SEED, features regresses the
    teacher's unit features, without a queue. queue: the teacher's keys. temperature: tau_S; teacher_temperature: tau_T.
    own: whether an image's own key is among those that it is compared with, as in SEED; false is CompRess's form with
    one queue. head: of the student; linear or mlp. teacher_precision: the type that the teacher computes in;
    teacher_size: pixels that its images are resized to on the device, null: the student's. operands: the type of
    products with the queue's keys, whose sums are fp32.
    """

    views: ClassVar[int | None] = 1
    teaching: FeatureTeacher | None = None

    def __init__(
        self,
        encoder: Encoder,
        *,
        teacher: WeightsReference,
        dim: Annotated[int, Field(gt=0)],
        further_teachers: tuple[WeightsReference, ...] = (),
        teacher_network: str | None = None,
        by: Literal["similarity", "features"] = "similarity",
        queue: QueueOptions = QUEUE,
        temperature: Annotated[float, Field(gt=0)] = 0.2,
        teacher_temperature: Annotated[float, Field(gt=0)] = 0.01,
        own: bool = True,
        head: Literal["linear", "mlp"] = "mlp",
        teacher_precision: TeacherPrecision = "fp32",
        teacher_size: Annotated[int, Field(gt=0)] | None = None,
        operands: Operands = "fp32",
    ) -> None:
        super().__init__()
        self.encoder, self.dim, self.teachers = encoder, dim, (teacher, *further_teachers)
        self.temperature, self.teacher_temperature, self.own = temperature, teacher_temperature, own
        self.teacher_precision: TeacherPrecision = teacher_precision
        self.operands: Operands = operands
        self.teacher_size = teacher_size
        width = encoder.features
        hidden = [nn.Linear(width, width), nn.ReLU(inplace=True)] if head == "mlp" else []
        self.head = nn.Sequential(*hidden, nn.Linear(width, dim))
        self.queue = Queue(queue, dim) if by == "similarity" else None

    def load_pretrained(self, load: LoadMethod, fresh: bool) -> None:
        found = FeatureTeacher([load(where) for where in self.teachers], self.teacher_precision, self.teacher_size)
        if (features := found.features(self.encoder)) != self.dim:
            raise UserError(
                f"method.dim is {self.dim}, but the teacher has {features} features; use method.dim={features}"
            )
        self.teaching = found

    def embed(self, batch: Batch) -> Tensors:
        return {"z": unit(self.head(self.encoder(batch.views[0][:, 0])))}  # (N, D)

    def target(self, batch: Batch) -> Tensors:
        assert self.teaching, "load_pretrained() comes first"
        return {"t": self.teaching(batch.views[0][:, 0])}  # (N, D)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        if self.queue is None:
            return (z["z"] - t["t"]).square().sum(1).mean()  # 2 - 2 cos
        taus = self.temperature, self.teacher_temperature
        return similarity_distillation(z["z"], t["t"], self.queue, *taus, self.own, self.operands)

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        if self.queue is not None:
            self.queue.push(t["t"])

    def measured(self, z: Tensors, t: Tensors) -> Tensor:
        return torch.stack([z["z"], t["t"]], 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SEED":
        """Moves the teacher, which is no submodule, to a device together with the student."""
        if self.teaching:
            self.teaching.apply(fn)
        return super()._apply(fn, recurse)
