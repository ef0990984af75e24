"""The papers' linear protocol: a linear classifier on frozen features by SGD, with augmentation.

SimCLR, appendix B.6 (Chen et al. 2020; arXiv:2002.05709): SGD with Nesterov momentum 0.9 for 90 epochs, learning rate
0.1 · batch / 256 falling to 0 by a cosine, no weight decay, random crop and flip alone.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR

from kilobatch.data.batch import Batch
from kilobatch.data.views.options import Views
from kilobatch.methods import collectives
from kilobatch.trainer.evaluate.class_subset import only_among
from kilobatch.trainer.evaluate.features import Images, Represent
from kilobatch.trainer.evaluate.options import LinearOptions
from kilobatch.trainer.ranks.heartbeat import heartbeat


class Epochs(Protocol):
    """Augmented training images, one view each, in another order every epoch: this rank's part of each batch."""

    steps_per_epoch: int

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]: ...


def probe_views(views: Views) -> Views:
    """The views for `Epochs`: the recipe's own crop and flip, and nothing else."""
    return views.model_copy(
        update={"count": 1, "jitter": None, "grey": 0.0, "blur": None, "solarize": None, "second": None, "affine": None}
    )


def evaluate(
    represent: Represent,
    train: Epochs,
    test: Images,
    classes: int,
    options: LinearOptions,
    among: Sequence[int] | None = None,
) -> Iterator[tuple[str, float]]:
    """Yields linear/top1 and linear/top5 (0..1). among: the classes that may be predicted; None: all."""
    head = fit(represent, train, classes, options)
    logits, labels = [], []
    for batch in test:
        logits.append(head(represent(batch.views[:, 0])).detach())
        labels.append(batch.label)
        heartbeat()
    empty = head.bias.new_zeros(0, classes), torch.zeros(0, dtype=torch.int64, device=head.bias.device)
    for k, share in top_accuracies(torch.cat([empty[0], *logits]), torch.cat([empty[1], *labels]), among).items():
        yield f"linear/top{k}", share


def fit(represent: Represent, train: Epochs, classes: int, options: LinearOptions) -> nn.Linear:
    """The classifier after options.epochs, the same on every rank. It starts at zero, as the problem is convex."""
    batches = (batch for epoch in range(options.epochs) for batch in train.epoch(epoch))
    first = next(batches)
    x = represent(first.views[:, 0])
    head = _zero(x.shape[1], classes, x.device)
    optimizer = torch.optim.SGD(
        head.parameters(),
        lr=options.lr * options.batch / 256,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        nesterov=options.momentum > 0,
    )
    schedule = CosineAnnealingLR(optimizer, options.epochs * train.steps_per_epoch)
    for batch in chain([first], batches):
        optimizer.zero_grad()
        cross_entropy(head(represent(batch.views[:, 0])), batch.label).backward()
        _average(head)
        optimizer.step()
        schedule.step()
        heartbeat()
    return head


def top_accuracies(logits: Tensor, label: Tensor, among: Sequence[int] | None = None) -> dict[int, float]:
    """{1: top-1, 5: top-5}: the shares of all ranks' rows whose class has one of the k largest logits.

    With fewer than five classes, the second counts all of them. among: the classes that are predicted, and from which
    labels come; None: all.
    """
    classes = logits.shape[1] if among is None else len(among)
    ranked = only_among(logits, among).topk(min(5, classes)).indices == label[:, None]  # (n, 5)
    tally = torch.stack([ranked[:, :1].sum(), ranked.sum(), torch.full_like(ranked.sum(), len(label))])
    first, five, rows = collectives.all_reduce_sum(tally).tolist()
    return {1: first / rows, 5: five / rows}


def _zero(features: int, classes: int, device: torch.device) -> nn.Linear:
    head = nn.Linear(features, classes, device=device)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    return head


def _average(head: nn.Linear) -> None:
    """Averages the gradients over ranks. All have equally many samples, so that is the global batch's gradient."""
    gradients = [parameter.grad for parameter in head.parameters() if parameter.grad is not None]
    flat = collectives.mean(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
