"""Distillation's formula for a batch in which some images have labels; and constructions that weight images wrongly."""

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.distill import Distill
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.methods.parity.formulas import finetune
from kilobatch.methods.parity.formulas.finetune import SAMPLES, cross_entropies, prepared
from kilobatch.methods.parity.standard import Construction, GroupShape, Standard, own_slice

TEMPERATURE, ALPHA = 0.7, 0.6


def labels(samples: int) -> Tensor:
    """Labels that are -1 for most of the first half, so that some ranks have few and others many."""
    i = torch.arange(samples)
    return finetune.labels(samples).where((i % 4 == 0) | (i > samples // 2), -1)


def build(mode: Mode) -> Method:
    teacher = prepared(FineTune(ConvNet(3, mode), layer=0))
    student = Distill(ConvNet(4, mode), teacher="teacher", temperature=TEMPERATURE, alpha=ALPHA)
    prepared(student).load_pretrained(lambda reference: teacher, fresh=True)
    return student


def probabilities(logits: Tensor) -> Tensor:
    e = (logits / TEMPERATURE).exp()
    return e / e.sum(1, keepdim=True)


def sums(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """The two sums of eq. 4: over labelled images with their labels, and over all images with the teacher, times the
    square of the temperature."""
    labelled = label >= 0
    by_teacher = -(TEMPERATURE**2) * (probabilities(teacher) * probabilities(student).log()).sum()
    return cross_entropies(student[labelled], label[labelled]).sum(), by_teacher


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    by_label, by_teacher = sums(z["logits"], t["logits"], batch.label)
    return ((1 - ALPHA) * by_label + ALPHA * by_teacher) / len(batch)


def _labelled_mean(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    """The first sum divided by the number of this rank's labelled images."""
    by_label, by_teacher = sums(z["logits"], t["logits"], batch.label)
    return (1 - ALPHA) * by_label / (batch.label >= 0).sum() + ALPHA * by_teacher / len(batch)


def _whole(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    student, teacher, label = own_slice(z["logits"]), collectives.gather(t["logits"]), collectives.gather(batch.label)
    by_label, by_teacher = sums(student, teacher, label)
    return ((1 - ALPHA) * by_label + ALPHA * by_teacher) / SAMPLES


STANDARD = Standard(
    build,
    formula,
    constructions=(
        # In one process this is a mean over all labelled images; the average over ranks is not.
        Construction("labels' sum over each rank's own labelled images", _labelled_mean, _labelled_mean, False),
        Construction("whole loss on every rank, own slice", _whole, formula, False),
    ),
    samples=SAMPLES,
    groups=(GroupShape(1),),
    labels=labels,
)
