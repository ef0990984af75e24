"""A picture of what the encoder has learned: whom it takes for neighbours, and where it puts each class."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.nn.functional import normalize

from kilobatch.data.files import write_whole
from kilobatch.trainer.evaluate.gallery import Gallery
from kilobatch.trainer.evaluate.knn import vote

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

BANK, ASKED = 4096, 1000  # images to collect for the neighbours, and for the embedding
ROWS, NEAREST = 8, 7  # queries shown, and neighbours of each
COLOURED = 10  # classes with a colour of their own
RIGHT, WRONG, INK, PALE = "#2a9d5c", "#d1495b", "#22303c", "#5b6b78"


def draw(bank: Gallery, asked: Gallery, classes: Sequence[str], title: str, path: Path) -> None:
    """Writes one PNG: left, some of `asked` with their nearest neighbours in `bank`; right, `asked` in 2-D.

    bank: training images (at most BANK), asked: test images (at most ASKED), more than 2. classes: the labels' names.
    Raises OSError where path cannot be written; it is replaced as a whole.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), facecolor="white")
    figure.suptitle(title, x=0.021, ha="left", fontsize=15, fontweight="bold", color=INK)
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.12, 1))[0]
    _neighbours(left, bank, asked, classes)
    _embedding(right.subplots(), asked, classes)
    right.subplots_adjust(left=0.03, right=0.84, top=0.86, bottom=0.03)
    right.text(0.03, 0.925, "The test images in the encoder's space", color=INK, fontsize=11)
    right.text(0.03, 0.898, "t-SNE of the normalised features, coloured by class", color=PALE, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [buffer.getvalue()])


def _neighbours(figure: SubFigure | Figure, bank: Gallery, asked: Gallery, classes: Sequence[str]) -> None:
    rows, nearest = min(ROWS, len(asked)), min(NEAREST, len(bank))
    chosen = _spread(asked.label, rows)
    similarity, index = (normalize(asked.x[chosen], dim=1) @ normalize(bank.x, dim=1).T).topk(nearest)
    axes = figure.subplots(rows, nearest + 1, squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.34})
    figure.subplots_adjust(left=0.04, right=0.97, top=0.86, bottom=0.03)
    for row, query in enumerate(chosen.tolist()):
        label = int(asked.label[query])
        _tile(axes[row, 0], asked.image[query], classes[label], INK)
        for column in range(nearest):
            found = int(index[row, column])
            colour = RIGHT if int(bank.label[found]) == label else WRONG
            text = f"{float(similarity[row, column]):.3f}"
            _tile(axes[row, column + 1], bank.image[found], text, colour)
    everyone = (normalize(asked.x, dim=1) @ normalize(bank.x, dim=1).T).topk(min(5, len(bank)))
    voted = vote(everyone.values, bank.label[everyone.indices], int(bank.label.max()) + 1, 0.07)
    share = float((voted == asked.label).double().mean())
    note = f"green: same class, red: another · 5 neighbours vote right for {share:.1%} of {len(asked)} test images"
    figure.text(0.04, 0.925, "Test images, their nearest training images, and the cosine", color=INK, fontsize=11)
    figure.text(0.04, 0.898, note, color=PALE, fontsize=9)


def _embedding(axes: Axes, asked: Gallery, classes: Sequence[str]) -> None:
    from matplotlib import colormaps
    from sklearn.manifold import TSNE

    # Euclidean distance on the unit sphere orders pairs as the cosine does.
    points = normalize(asked.x, dim=1).numpy().astype(np.float64)
    perplexity = min(30.0, (len(points) - 1) / 3)
    flat = TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(points)
    labels = asked.label.numpy()
    commonest = np.argsort(-np.bincount(labels), kind="stable")[:COLOURED]
    colour = colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue] (a ListedColormap)
    others = ~np.isin(labels, commonest)
    if others.any():
        axes.scatter(*flat[others].T, s=10, color="#d8dde1", linewidths=0, label="others")
    for i, label in enumerate(sorted(int(label) for label in commonest if (labels == label).any())):
        axes.scatter(*flat[labels == label].T, s=22, color=colour[i], alpha=0.85, linewidths=0, label=classes[label])
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=10, markerscale=1.6)


def _tile(axes: Axes, image: Tensor, text: str, colour: str) -> None:
    """image (3, H, W) uint8, framed and captioned."""
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest" if image.shape[-1] < 48 else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.set_title(text if len(text) <= 12 else text[:11] + "…", color=colour, fontsize=8.5, pad=3)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.2)


def _spread(label: Tensor, count: int) -> Tensor:
    """(count,) rows, of as many classes as there are, each class's first row before any second."""
    labels = label.numpy()
    order = np.argsort(labels, kind="stable")
    turn = np.empty(len(labels), dtype=np.int64)  # how many of the same class come before
    starts = np.searchsorted(labels[order], labels[order])
    turn[order] = np.arange(len(labels)) - starts
    return label.new_tensor(np.lexsort((labels, turn))[:count])
