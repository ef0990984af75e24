"""MiCE: Tsai, Li, Zhu 2021, arxiv.org/abs/2105.01899; authors' code: github.com/TsungWeiTsai/MiCE.

Gate pi_k = softmax_k(omega_k g / kappa); expert k has MoCo's likelihood of key v_k for the query f_k + mu_k,
Phi_k = e^(v_k (f_k + mu_k) / tau) / (e^(v_k (f_k + mu_k) / tau) + sum over the queue of e^(q_jk (f_k + mu_k) / tau)).
L = -log sum over k of pi_k Phi_k, and at an epoch's end mu_k <- the direction of the sum of v_k over its images.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.losses.experts import expert_log_likelihoods, simplex
from kilobatch.methods.memories.cluster_sums import ClusterSums
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.method import EpochFeatures, Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import unit
from kilobatch.methods.options import Operands
from kilobatch.methods.parameter_groups import ParameterGroup

QUEUE = QueueOptions(length=16_384)


class MiCE(Method):
    """Experts divide the images among them, and each tells its own apart: section 3.

    experts: K, the clusters that are looked for. queue: of the K keys of each image. temperature: tau, of the experts;
    gate_temperature: kappa. momentum: of the momentum encoder, which makes the keys. dim: numbers of an embedding,
    K - 1 or more. learn_centres: whether gradients move mu as well, as in the paper; in the authors' code mu is in no
    optimizer, and only the end of an epoch moves it. operands: the type of products with the queue's keys, whose sums
    are fp32.

    The first view is the experts', the second the keys', the third the gate's. An expert without images in an epoch
    keeps its mu; theirs becomes 0.
    """

    views: ClassVar[int | None] = 3
    gates: Tensor  # (K, D): omega
    centres: Tensor  # (K, D): mu, less what gradients have added

    def __init__(
        self,
        encoder: Encoder,
        *,
        experts: Annotated[int, Field(gt=1)] = 10,
        queue: QueueOptions = QUEUE,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        gate_temperature: Annotated[float, Field(gt=0)] = 1.0,
        momentum: Annotated[float, Field(ge=0, le=1)] = 0.999,
        dim: Annotated[int, Field(gt=0)] = 128,
        learn_centres: bool = False,
        operands: Operands = "fp32",
    ) -> None:
        super().__init__()
        self.encoder, self.temperature, self.gate_temperature = encoder, temperature, gate_temperature
        self.momentum, self.shape = momentum, (experts, dim)
        self.operands: Operands = operands
        self.register_buffer("gates", simplex(experts, dim))
        self.expert_heads = nn.Linear(encoder.features, experts * dim)
        self.gate_head = nn.Linear(encoder.features, dim)
        self.register_buffer("centres", unit(torch.randn(experts, dim)))
        self.learnt = nn.Parameter(torch.zeros(experts, dim)) if learn_centres else None
        self.momentum_encoder = MomentumEncoder(self.online())
        self.queue = Queue(queue, experts * dim)
        self.queue.keys.copy_(unit(self.by_expert(self.queue.keys)).flatten(1))
        self.sums = ClusterSums(experts, dim)
        self.chosen: Tensor | None = None  # (n,): the expert of each image of the step, from loss() to update()

    def online(self) -> nn.Module:
        return nn.Sequential(self.encoder, self.expert_heads)

    def by_expert(self, rows: Tensor) -> Tensor:
        return rows.unflatten(1, self.shape)  # (n, K, D)

    def groups(self) -> Sequence[ParameterGroup]:
        # What is learnt is a part of mu, and without decay: its length is not mu's.
        return [] if self.learnt is None else [ParameterGroup("learnt", decay=0.0)]

    def mu(self) -> Tensor:
        return unit(self.centres if self.learnt is None else self.centres + self.learnt)

    def before_epoch(self, epoch: int, features: EpochFeatures) -> None:
        sums, counts = self.sums.total()
        moved = unit(sums) if self.learnt is None else unit(sums) - self.learnt
        self.centres.copy_(torch.where(counts[:, None] > 0, moved.to(self.centres), self.centres))
        self.sums.clear()

    def embed(self, batch: Batch) -> Tensors:
        x_f, _, x_g = batch.views[0].unbind(1)
        f, g = self.expert_heads(self.encoder(x_f)), self.gate_head(self.encoder(x_g))
        return {"f": unit(self.by_expert(f)), "g": unit(g)}  # (N, K, D), (N, D)

    def target(self, batch: Batch) -> Tensors:
        return {"v": unit(self.by_expert(self.momentum_encoder(batch.views[0][:, 1])))}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        log_pi = F.log_softmax(z["g"] @ self.gates.T / self.gate_temperature, 1)
        q = z["f"] + self.mu()
        joint = log_pi + expert_log_likelihoods(q, t["v"], self.queue, self.temperature, self.operands)  # (n, K)
        self.chosen = joint.detach().argmax(1)
        return -joint.logsumexp(1).mean()

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        assert self.chosen is not None, "loss() comes before update()"
        self.momentum_encoder.follow(self.online(), self.momentum)
        self.sums.add(t["v"][torch.arange(len(batch)), self.chosen], self.chosen)
        self.queue.push(t["v"].flatten(1))

    def measured(self, z: Tensors, t: Tensors) -> Tensor:
        return unit(torch.stack([z["f"], t["v"]], 1).flatten(2))  # of all experts, as one

    def scalars(self) -> dict[str, float]:
        """Of this rank's images of the epoch so far: the largest expert's share, and how many experts are in use, as
        the exponential of the entropy of their shares."""
        shares = self.sums.counts.double() / self.sums.counts.sum().clamp_min(1)
        return {"experts_used": torch.special.entr(shares).sum().exp().item(), "largest_expert": shares.max().item()}
