"""Distillation's formula where some images have labels; and constructions that weigh images wrongly."""

import torch
from torch import Tensor

from kilobatch.methods import collectives as across
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.distill import Distill
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.methods.parity.formulas import finetune
from kilobatch.methods.parity.formulas.finetune import SAMPLES, built, cross_entropies
from kilobatch.methods.parity.standard import Construction, Standard, own_slice

TEMPERATURE, ALPHA = 0.7, 0.6


def labels(samples: int) -> Tensor:
    """-1 for most of the first half, so that ranks have few or many."""
    i = torch.arange(samples)
    return finetune.labels(samples).where((i % 4 == 0) | (i > samples // 2), -1)


def build(mode: Mode) -> Method:
    teacher = built(FineTune(ConvNet(3, mode), layer=0))
    student = Distill(ConvNet(4, mode), teacher="teacher", temperature=TEMPERATURE, alpha=ALPHA)
    built(student).take(lambda where: teacher, fresh=True)
    return student


def probabilities(logits: Tensor) -> Tensor:
    e = (logits / TEMPERATURE).exp()
    return e / e.sum(1, keepdim=True)


def sums(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 4 of some images: the labelled ones' sum by labels, and all ones' by the teacher."""
    known = label >= 0
    by_teacher = -(probabilities(teacher) * probabilities(student).log()).sum()
    return cross_entropies(student[known], label[known]).sum(), by_teacher


def formula(method: Method, z: Tensors, t: Tensors) -> Tensor:
    n = len(z["logits"])
    by_label, by_teacher = sums(z["logits"], t["logits"], labels(SAMPLES)[across.own(n)])
    return ((1 - ALPHA) * by_label + ALPHA * by_teacher) / n


def _labelled_mean(method: Method, z: Tensors, t: Tensors) -> Tensor:
    """The first sum over the number of this rank's own labelled images."""
    n = len(z["logits"])
    label = labels(SAMPLES)[across.own(n)]
    by_label, by_teacher = sums(z["logits"], t["logits"], label)
    return (1 - ALPHA) * by_label / (label >= 0).sum() + ALPHA * by_teacher / n


def _whole(method: Method, z: Tensors, t: Tensors) -> Tensor:
    by_label, by_teacher = sums(own_slice(z["logits"]), across.gather(t["logits"]), labels(SAMPLES))
    return ((1 - ALPHA) * by_label + ALPHA * by_teacher) / SAMPLES


STANDARD = Standard(
    build,
    formula,
    constructions=(
        # Of all images in one process it is a mean over labelled ones, too; its ranks' average is not.
        Construction("labels' sum over each rank's own labelled images", _labelled_mean, _labelled_mean, False),
        Construction("whole loss on every rank, own slice", _whole, formula, False),
    ),
    samples=SAMPLES,
    views=1,
    labels=labels,
)
