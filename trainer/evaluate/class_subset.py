"""Test images of some of the training classes, as ImageNet-A's and -R's: labels and predictions among those alone.

As the authors of both do (Hendrycks et al. 2021, arxiv.org/abs/1907.07174 and arxiv.org/abs/2006.16241; eval.py of
github.com/hendrycks/imagenet-r): a classifier of all training classes predicts the most likely of the test's classes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.trainer.evaluate.features import Images


class Relabelled:
    """The images with other labels: numbers[l] instead of l, the class's number among those of the training."""

    def __init__(self, images: Images, numbers: Sequence[int]) -> None:
        self.images, self.samples = images, images.samples
        self.numbers = torch.tensor(numbers)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.images:
            yield replace(batch, label=self.numbers.to(batch.label.device)[batch.label])


def only_among(scores: Tensor, among: Sequence[int] | None) -> Tensor:
    """Scores (n, classes) with minus infinity for classes that are not among these; None: all classes count."""
    if among is None:
        return scores
    kept = torch.zeros(scores.shape[1], dtype=torch.bool, device=scores.device)
    kept[list(among)] = True
    return scores.masked_fill(~kept, -torch.inf)
