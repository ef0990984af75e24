"""Linear classifiers on frozen features by SGD, with augmentation: the protocol of each paper, or a search over rates.

The defaults are SimCLR's, appendix B.6 (Chen et al. 2020; arXiv:2002.05709): SGD with Nesterov momentum 0.9 for 90
epochs, learning rate 0.1 · batch / 256 falling to 0 by a cosine, no weight decay, random crop and flip alone. Other
papers' rates are up to 300 times larger, since their features are smaller; each recipe has its paper's.

A search trains a classifier for each rate and decay twice, all on the same features: one learns from all images, one
from all but a tenth of them, held out. The held-out images' accuracy in the last epoch chooses rate and decay, and the
classifier of these that has learned from all is taken. No test image is looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from kilobatch.data.batch import Batch
from kilobatch.data.errors import UserError
from kilobatch.data.tensor_rng import keys
from kilobatch.data.views.options import Crop, Views
from kilobatch.methods import collectives
from kilobatch.trainer.evaluate.class_subset import only_among
from kilobatch.trainer.evaluate.features import Images, Represent
from kilobatch.trainer.evaluate.options import LinearOptions
from kilobatch.trainer.optim.schedules import lr_at
from kilobatch.trainer.ranks.heartbeat import heartbeat
from kilobatch.trainer.ranks.phase import phase

HELD_OUT = 10  # one image of so many, by its index alone, takes no part in the training that a choice is made by
SEED = 10  # of that choice of images; not the run's seed, so that all runs hold out the same


class Epochs(Protocol):
    """Augmented training images, one view each, in another order every epoch: this rank's part of each batch."""

    steps_per_epoch: int

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Fitted:
    """A classifier, the same on every rank; its rate and decay; held_out: the share of held-out images that the one
    beside it found right, None where nothing was searched."""

    head: nn.Linear
    lr: float
    weight_decay: float
    held_out: float | None


def probe_views(views: Views, options: LinearOptions | None = None) -> Views:
    """The views for `Epochs`: random crop and flip, and nothing else, as LinearOptions has it."""
    options = options or LinearOptions()
    crop = options.crop or (Crop() if views.crop else None)
    flip = views.flip if options.flip is None else options.flip
    nothing = dict.fromkeys(("affine", "jitter", "photometric", "blur", "solarize", "second"))
    return views.model_copy(update={"count": 1, "crop": crop, "flip": flip, "grey": 0.0, **nothing})


def evaluate(
    represent: Represent,
    train: Epochs,
    test: Images,
    classes: int,
    options: LinearOptions,
    among: Sequence[int] | None = None,
) -> Iterator[tuple[str, float]]:
    """Yields linear/top1 and linear/top5 (0..1), and, after a search, linear/lr, linear/weight_decay and
    linear/held_out (0..1). among: the classes that may be predicted; None: all."""
    fitted = fit(represent, train, classes, options)
    head = fitted.head
    logits, labels = [], []
    done = 0
    for batch in test:
        logits.append(head(represent(batch)).detach())
        labels.append(batch.label)
        done += len(batch) * collectives.world_size()
        phase("linear: test images", min(done, test.samples), test.samples)
        heartbeat()
    empty = head.bias.new_zeros(0, classes), torch.zeros(0, dtype=torch.int64, device=head.bias.device)
    for k, share in top_accuracies(torch.cat([empty[0], *logits]), torch.cat([empty[1], *labels]), among).items():
        yield f"linear/top{k}", share
    if fitted.held_out is not None:
        yield "linear/lr", fitted.lr
        yield "linear/weight_decay", fitted.weight_decay
        yield "linear/held_out", fitted.held_out


def fit(represent: Represent, train: Epochs, classes: int, options: LinearOptions) -> Fitted:
    """The classifier after options.epochs. It starts at zero, as the problem is convex."""
    heads, right = fit_heads(represent, train, classes, options)
    return heads.best(right)


def fit_heads(represent: Represent, train: Epochs, classes: int, options: LinearOptions) -> tuple["Heads", Tensor]:
    """A classifier for each rate and decay, after options.epochs, and what Heads.best chooses one by."""
    heads, right, step, schedule = None, torch.zeros(3, 0), 0, options.rate_schedule
    for epoch in range(options.epochs):
        phase("linear: epochs", epoch, options.epochs)
        for batch in train.epoch(epoch):
            x = represent(batch)
            if heads is None:
                heads = Heads(x.shape[1], classes, options, x.device)
            tried = heads.step(x, batch, lr_at(schedule, 1.0, step, train.steps_per_epoch))
            right = tried if step % train.steps_per_epoch == 0 else right + tried
            step += 1
            heartbeat()
    assert heads is not None, "a loader has at least one batch"
    return heads, collectives.all_reduce_sum(right)


class Heads:
    """Linear classifiers on the same features, one for each rate and decay; torch's SGD with these for each.

    Where there are several, as many again follow, which do not learn from the held-out images. weight, its velocity:
    (H, classes, features); bias, its velocity: (H, classes).
    """

    def __init__(self, features: int, classes: int, options: LinearOptions, device: torch.device) -> None:
        self.options, self.grid = options, options.grid
        self.searches = len(self.grid) > 1
        settings = torch.tensor(self.grid * (1 + self.searches), device=device)
        self.lr, self.decay = settings.T * torch.tensor([[options.batch / 256], [1.0]], device=device)
        self.weight = torch.zeros(len(settings), classes, features, device=device)
        self.bias = torch.zeros(len(settings), classes, device=device)
        self.velocities = torch.zeros_like(self.weight), torch.zeros_like(self.bias)

    @torch.no_grad()
    def step(self, x: Tensor, batch: Batch, share: float) -> Tensor:
        """One update. x: (N, features); share: of the rates. Returns (3, grid) float64, of this rank's held-out images
        before the update: how many, how many each of the second half finds right, and the sum of its cross-entropies;
        (3, 0): nothing is searched."""
        heads, classes = self.bias.shape
        label, device = batch.label, x.device
        logits = (x @ self.weight.flatten(0, 1).T).view(len(x), heads, classes) + self.bias
        held = held_out(batch.index) if self.searches else torch.zeros(len(x), dtype=torch.bool, device=device)
        tried = self._tried(logits[held, len(self.grid) :], label[held])
        learns = torch.ones(len(x), heads, device=device)
        learns[held, len(self.grid) :] = 0
        error = (logits.softmax(2) - one_hot(label, classes)[:, None]) * learns[:, :, None]
        slope = (error.flatten(1).T @ x).view_as(self.weight)
        sums = [slope.flatten(), error.sum(0).flatten(), learns.sum(0)]
        flat = collectives.all_reduce_sum(torch.cat(sums)).split([len(part) for part in sums])
        count = flat[2].clamp(min=1)  # of the images that each learns from, over all ranks
        for value, velocity, total in zip((self.weight, self.bias), self.velocities, flat[:2], strict=True):
            each = (-1, *[1] * (value.dim() - 1))
            gradient = total.view_as(value) / count.view(each) + self.decay.view(each) * value
            velocity.mul_(self.options.momentum).add_(gradient)
            update = gradient + self.options.momentum * velocity if self.options.nesterov else velocity
            value -= share * self.lr.view(each) * update
        return tried

    def _tried(self, logits: Tensor, label: Tensor) -> Tensor:
        """logits: (n, grid or 0, classes). Returns what step() does."""
        right = (logits.argmax(2) == label[:, None]).sum(0).double()
        of_label = logits.gather(2, label[:, None, None].expand(-1, logits.shape[1], 1))[:, :, 0]
        loss = (logits.logsumexp(2) - of_label).double().sum(0)
        return torch.stack([torch.full_like(right, len(label)), right, loss])

    def best(self, right: Tensor) -> Fitted:
        """The classifier that has learned from all images with the best rate and decay: the most held-out images
        right, and of equally many the lowest cross-entropy. right: as step() returns it, over all ranks and the last
        epoch. Raises UserError where no image was held out."""
        chosen, share = 0, None
        if self.searches:
            count = int(right[0, 0])
            if not count:
                raise UserError(
                    "evaluate.linear: of so few training images none is held out, by which a rate could be chosen; "
                    "give one rate, such as evaluate.linear.lr=0.1"
                )
            chosen = max(range(len(self.grid)), key=lambda k: (right[1, k].item(), -right[2, k].item()))
            share = right[1, chosen].item() / count
        lr, decay = self.grid[chosen]
        return Fitted(self.classifier(chosen), lr, decay, share)

    @torch.no_grad()
    def classifier(self, k: int) -> nn.Linear:
        """The one with the rate and decay of grid[k] that has learned from all images."""
        head = nn.Linear(self.weight.shape[2], self.weight.shape[1], device=self.weight.device)
        head.weight.copy_(self.weight[k])
        head.bias.copy_(self.bias[k])
        return head


def held_out(index: Tensor) -> Tensor:
    """(N,) bool: whether each image, by its place in the data set, is held out from the training that a rate is chosen
    by. index: (N,) int64."""
    return keys(SEED, 0, index, 1).flatten() % HELD_OUT == 0


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
