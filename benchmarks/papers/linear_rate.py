"""The linear probe on features of MoCo's scale: the paper's protocol and the search, beside every rate.

    python -m benchmarks.papers.linear_rate
    python -m benchmarks.papers.linear_rate --images 3200

Features without a network, in ImageNet's proportions with a ResNet-50, a 32nd of each: 64 features for 2048, 32 classes
for 1000, 40,960 images for 1,281,167. They are positive, as pooled ReLUs are, made of directions with variances that
fall as 1, 1/2, 1/3, ..., and have a deviation of 1 / 17.3 each: a rate of 0.1 is usual for features of deviation 1, as
a norm without parameters makes them, and 300 times that, MoCo's 30, for features the root of 300 smaller, since both
the gradient and what it changes are proportional to them.

Each rate of the search is tried with MoCo's protocol (main_lincls.py: SGD without Nesterov, 100 epochs, a tenth of the
rate after 60 and 80); the best of them is what a probe can reach by that protocol. The paper's rate and the searched
one have to come within a point of it; otherwise the exit code is 1. --images 3200 are 50 for each feature, where
ImageNet has 626: high rates then fit a classifier too closely.
"""

import argparse
import sys
from collections.abc import Iterator

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from kilobatch.data.batch import Batch, make_batch
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.trainer.evaluate import linear
from kilobatch.trainer.evaluate.options import SEARCHED_RATES, LinearOptions

CLASSES, WIDTH, BATCH = 32, 64, 256
SPECTRUM = torch.arange(1, WIDTH + 1) ** -0.5  # deviations of the directions
DEVIATION = 1 / 17.3
WITHIN = 1.0  # points


class Features:
    """Features of images, and their labels: by epochs in random orders to train on, and all in order to test on."""

    def __init__(self, samples: int, seed: int) -> None:
        means, lift = torch.randn(CLASSES + WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)).split(
            (CLASSES, WIDTH)
        )
        random = torch.Generator().manual_seed(seed)
        self.label = torch.randint(CLASSES, (samples,), generator=random)
        inner = SPECTRUM * (0.55 * means[self.label] + torch.randn(samples, WIDTH, generator=random))
        noise = 0.1 * torch.randn(samples, WIDTH, generator=random)
        self.x = torch.relu(inner @ lift / SPECTRUM.norm() + noise)
        self.samples, self.steps_per_epoch = samples, samples // BATCH

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(epoch))
        whole = order[: self.steps_per_epoch * BATCH]
        yield from map(self._batch, whole.view(-1, BATCH)[first_step:])

    def _batch(self, index: Tensor) -> Batch:
        return make_batch(self.x[index][:, None], index, self.label[index])

    def share_right(self, head: nn.Linear) -> float:
        """In per cent."""
        return 100 * head(self.x).argmax(1).eq(self.label).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=40_960, help="to train on")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train, test = Features(arguments.images, 1), Features(20_000, 2)
    factor = DEVIATION / train.x.std(0)
    train.x *= factor
    test.x *= factor
    papers = resolve_recipe("moco_v2_imagenet", []).evaluate.linear
    assert papers.lr in SEARCHED_RATES, papers.lr

    def features(batch: Batch) -> Tensor:
        return batch.views[0][:, 0]

    heads, right = linear.fit_heads(features, train, CLASSES, papers.model_copy(update={"lr": SEARCHED_RATES}))
    reached = {lr: test.share_right(heads.classifier(k)) for k, lr in enumerate(SEARCHED_RATES)}
    best, found = max(reached, key=lambda lr: reached[lr]), heads.best(right).lr
    simclrs = test.share_right(linear.fit(features, train, CLASSES, LinearOptions()).head)
    console, table = Console(), Table("rate", "top-1, %", "")
    names = (best, "the best"), (papers.lr, "the paper's"), (found, "found by the search")
    for lr, share in reached.items():
        table.add_row(f"{lr:g}", f"{share:.1f}", ", ".join(what for rate, what in names if rate == lr))
    table.add_row("0.1", f"{simclrs:.1f}", "SimCLR's protocol")
    console.print(table)
    sys.exit(0 if min(reached[papers.lr], reached[found]) > reached[best] - WITHIN else 1)


if __name__ == "__main__":
    main()
