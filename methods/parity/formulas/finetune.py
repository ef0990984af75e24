"""Fine-tuning's formula, cross-entropy; and a construction that loses a part of its gradient."""

import torch
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts, Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.methods.parity.standard import Construction, GroupShape, Standard, own_slice

SAMPLES, CLASSES = 48, 5


def labels(samples: int) -> Tensor:
    return torch.arange(samples) * 7 % CLASSES


def prepared(method: FineTune) -> FineTune:
    """The method, prepared, with random weights of the classifier, so that its logits differ."""
    method.prepare(DataFacts(SAMPLES, CLASSES))
    nn.init.normal_(method.classifier.weight)
    return method


def build(mode: Mode) -> Method:
    return prepared(FineTune(ConvNet(4, mode), layer=2, hidden=10, dim=6))  # a hidden layer, and the head's last


def cross_entropies(logits: Tensor, label: Tensor) -> Tensor:
    """(n,) -log softmax(logits)_label."""
    e = logits.exp()
    return -(e[torch.arange(len(e)), label] / e.sum(1)).log()


def formula(method: Method, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
    return cross_entropies(z["logits"], batch.label).mean()


STANDARD = Standard(
    build,
    formula,
    constructions=(
        Construction("the mean of each rank's own images", formula, formula, True),
        Construction(
            "whole loss on every rank, own slice",
            lambda method, z, t, batch: cross_entropies(own_slice(z["logits"]), collectives.gather(batch.label)).mean(),
            formula,
            False,
        ),
    ),
    samples=SAMPLES,
    groups=(GroupShape(1),),
    labels=labels,
)
