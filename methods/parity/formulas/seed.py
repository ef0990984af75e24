"""SEED's formula, with all probabilities over the queue and the image's own key; and constructions that lose a part."""

from typing import cast

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.methods.papers.seed import SEED
from kilobatch.methods.parity.formulas.finetune import prepared
from kilobatch.methods.parity.standard import GroupShape, Standard, queue_constructions

KEYS, TAU, TAU_T = 48, 0.2, 0.1


def build(mode: Mode) -> Method:
    teacher = prepared(FineTune(ConvNet(1, "global"), layer=0))
    queue = QueueOptions(length=KEYS, placement="sharded")
    student = SEED(ConvNet(4, mode), teacher="teacher", dim=8, queue=queue, temperature=TAU, teacher_temperature=TAU_T)
    student.load_pretrained(lambda reference: teacher, fresh=True)
    return student


def cross_entropy(z: Tensor, t: Tensor, keys: Tensor) -> Tensor:
    """Fang et al., eq. 4 to 6, image by image. z, t (n, D), keys (K, D)."""
    total = z.new_zeros(())
    for z_i, t_i in zip(z, t, strict=True):
        d = torch.cat([keys, t_i[None]])
        p_t = (d @ t_i / TAU_T).exp() / (d @ t_i / TAU_T).exp().sum()
        p_s = (d @ z_i / TAU).exp() / (d @ z_i / TAU).exp().sum()
        total = total - (p_t * p_s.log()).sum()
    return total / len(z)


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The loss against this rank's part of the queue, which is the whole queue in one process."""
    return cross_entropy(z["z"], t["t"], held(method))


def held(method: Method) -> Tensor:
    queue = cast(SEED, method).queue
    assert queue is not None
    return queue.keys


def remembered(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The step's keys, which are the teacher's, replace the oldest."""
    return torch.cat([held(method), t["t"]])[-KEYS:]


STANDARD = Standard(
    build,
    formula,
    constructions=queue_constructions(cross_entropy, "z", "t", held),
    groups=(GroupShape(1),),
    held=held,
    remembered=remembered,
)
