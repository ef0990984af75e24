"""DINO: Caron et al. 2021, arxiv.org/abs/2104.14294; authors' code: github.com/facebookresearch/dino.

Eq. 1 to 4, with g = z C^T of unit rows: p_v = softmax(g_v / tau) of a view by the student, q_i = softmax((g_i - c) /
tau_t) of a large view by the teacher, L = 1/2 sum over i of 1 / (V - 1) sum over v != i of -sum_k q_i,k log p_v,k;
c <- m c + (1 - m) mean of g_i.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from kilobatch.data.batch import Batch, Clock
from kilobatch.methods import collectives
from kilobatch.methods.losses.prototype_distillation import information, prototype_distillation, teacher_probabilities
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder, rising
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import BottleneckHead, Directions, embed_views
from kilobatch.methods.parameter_groups import ParameterGroup

LEAST_SHOWN, SHOWN = 8, 256  # samples that scalars() reads: of few they say nothing


class DINO(Method):
    """A student learns from small and large views what its own moving average, the teacher, makes of the large ones:
    algorithm 1. The teacher is what is kept.

    temperature: tau, the student's. teacher_temperature: tau_t, once it has risen; warmup_temperature: what it begins
    at; warmup_epochs: in which it rises, a step an epoch. momentum: of the teacher, which rises to 1 by a cosine;
    center_momentum: m, of the centre. prototypes: K; dim: numbers of a bottleneck; hidden: the width of the head's
    hidden layers. freeze_epochs: before which the prototypes stay as they began. unit_prototypes: whether they have
    length 1; else a length is learnt, too. head_norm: whether the head's hidden layers have BatchNorm.
    """

    views: ClassVar[int | None] = 2
    further_groups: ClassVar[bool] = True
    kept: ClassVar[str] = "teacher.network.0"
    center: Tensor  # c (K,)

    def __init__(
        self,
        encoder: Encoder,
        *,
        temperature: Annotated[float, Field(gt=0)] = 0.1,
        teacher_temperature: Annotated[float, Field(gt=0)] = 0.04,
        warmup_temperature: Annotated[float, Field(gt=0)] = 0.04,
        warmup_epochs: Annotated[int, Field(ge=0)] = 0,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.996,
        center_momentum: Annotated[float, Field(ge=0, le=1)] = 0.9,
        prototypes: Annotated[int, Field(gt=1)] = 65_536,
        dim: Annotated[int, Field(gt=0)] = 256,
        hidden: Annotated[int, Field(gt=0)] = 2048,
        freeze_epochs: Annotated[float, Field(ge=0)] = 1.0,
        unit_prototypes: bool = True,
        head_norm: bool = False,
    ) -> None:
        super().__init__()
        self.encoder, self.temperature, self.freeze_epochs = encoder, temperature, freeze_epochs
        self.momentum, self.center_momentum = momentum, center_momentum
        self.warmup = warmup_temperature, teacher_temperature, warmup_epochs
        directions = Directions(dim, prototypes, scaled=not unit_prototypes)
        self.head = BottleneckHead(encoder.features, hidden, dim, directions, encoder.norm if head_norm else None)
        self.teacher = MomentumEncoder(torch.nn.Sequential(self.encoder, self.head), own_statistics=True)
        self.register_buffer("center", torch.zeros(prototypes))
        self.last: tuple[Tensor, Tensor, float] | None = None  # of the last step: z, t and tau_t, for scalars()

    @property
    def teacher_prototypes(self) -> Tensor:
        return cast(BottleneckHead, self.teacher.network.get_submodule("1")).prototypes()

    def groups(self) -> Sequence[ParameterGroup]:
        return [ParameterGroup("head.prototypes", from_epoch=self.freeze_epochs)]

    def embed(self, batch: Batch) -> Tensors:
        return {"z": embed_views(self.encoder, self.head, batch.views)}  # (N, V, D), the large views first

    def target(self, batch: Batch) -> Tensors:
        large = batch.views[0]
        return {"z": self.teacher(large.flatten(0, 1)).unflatten(0, large.shape[:2])}  # (N, 2, D)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        teacher = t["z"], self.teacher_prototypes, self.center
        teacher_temperature = temperature_at(batch.clock, *self.warmup)
        return prototype_distillation(z["z"], self.head.prototypes(), teacher, self.temperature, teacher_temperature)

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        # The mean of the scores is the score of the mean row: D numbers cross ranks, not K.
        mean = self.teacher_prototypes @ collectives.mean(t["z"].mean((0, 1)))
        self.center.lerp_(mean, 1 - self.center_momentum)
        self.teacher.follow(torch.nn.Sequential(self.encoder, self.head), rising(self.momentum, batch.clock.progress))
        self.last = z["z"][:SHOWN], t["z"][:SHOWN], temperature_at(batch.clock, *self.warmup)

    @torch.no_grad()
    def scalars(self) -> dict[str, float]:
        """Of rank 0's images, with prototypes and centre as they are after the step. entropy: of q, 0 to ln K.
        divergence: of p from q, the loss less that. information: of q."""
        if not self.last or len(self.last[0]) < LEAST_SHOWN:
            return {}
        z, t, temperature = self.last
        teacher = t, self.teacher_prototypes, self.center
        q = teacher_probabilities(*teacher, temperature)
        entropy = torch.special.entr(q).sum(2).mean()
        loss = prototype_distillation(z, self.head.prototypes(), teacher, self.temperature, temperature)
        return {"entropy": float(entropy), "divergence": float(loss - entropy), "information": float(information(q))}


def temperature_at(clock: Clock, first: float, last: float, epochs: int) -> float:
    """The teacher's temperature in an epoch: in `epochs` from `first` to `last`, both included, then it stays."""
    share = min(1.0, clock.step // clock.per_epoch / max(1, epochs - 1)) if epochs else 1.0
    return first + share * (last - first)
