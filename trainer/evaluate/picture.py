"""Draws a picture of what the encoder has learned: nearest neighbours of test images, and a map of the classes."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from kilobatch.data.files import write_whole
from kilobatch.data.sources.path_names import without_wnid
from kilobatch.trainer.evaluate.fonts import Typeface, typeface_for
from kilobatch.trainer.evaluate.image_sample import ImageSample
from kilobatch.trainer.evaluate.knn import vote
from kilobatch.trainer.ranks.phase import phase

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

BANK_IMAGES, QUERY_IMAGES = 4096, 1000  # images to collect: of the training set, and of the test set
ROWS, NEAREST = 8, 7  # queries shown, and neighbours of each
COLOURED = 10  # classes that have a colour of their own
LEAST_DIFFERENT = 4  # features for t-SNE
ITERATIONS = 1000  # of t-SNE, at most
RIGHT, WRONG, INK, PALE = "#2a9d5c", "#d1495b", "#22303c", "#5b6b78"


def draw(
    bank: ImageSample,
    queries: ImageSample,
    classes: Sequence[str],
    title: str,
    path: Path,
    among: Sequence[int] | None = None,
) -> None:
    """Writes one PNG: left, some of the queries with their nearest neighbours in the bank; right, all queries in 2-D.

    bank: training images (at most BANK_IMAGES); queries: test images (at most QUERY_IMAGES, at least 1); classes: the
    labels' names, any text; among: the classes whose votes count, None: all. An existing file is replaced as a whole.
    Raises OSError where path cannot be written.
    """
    from matplotlib import style

    typeface = typeface_for([title, *(classes[int(label)] for label in queries.label.unique())])
    # The settings of the user's own matplotlibrc, such as LaTeX for all text, would let some names fail.
    with style.context(["default", {**typeface.settings()}]):
        picture = _render(bank, queries, classes, title, among, typeface)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, [picture])


def _render(
    bank: ImageSample,
    queries: ImageSample,
    classes: Sequence[str],
    title: str,
    among: Sequence[int] | None,
    typeface: Typeface,
) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 8), facecolor="white")
    figure.suptitle(typeface.text(title, 110), x=0.021, ha="left", fontsize=15, fontweight="bold", color=INK)
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.12, 1))[0]
    _draw_neighbours(left, bank, queries, classes, among, typeface)
    how = _draw_embedding(right, queries, classes, typeface)
    right.text(0.03, 0.925, "The test images in the encoder's space", color=INK, fontsize=11)
    right.text(0.03, 0.898, how, color=PALE, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _draw_neighbours(
    figure: SubFigure | Figure,
    bank: ImageSample,
    queries: ImageSample,
    classes: Sequence[str],
    among: Sequence[int] | None,
    typeface: Typeface,
) -> None:
    rows, nearest = min(ROWS, len(queries)), min(NEAREST, len(bank))
    shown = _rows_of_many_classes(queries.label, rows)
    similarity, index = (normalize(queries.x[shown], dim=1) @ normalize(bank.x, dim=1).T).topk(nearest)
    axes = figure.subplots(rows, nearest + 1, squeeze=False, gridspec_kw={"wspace": 0.08, "hspace": 0.34})
    figure.subplots_adjust(left=0.04, right=0.97, top=0.86, bottom=0.03)
    for row, query in enumerate(shown.tolist()):
        label = int(queries.label[query])
        _tile(axes[row, 0], queries.image[query], typeface.text(without_wnid(classes[label]), 12), INK)
        for column in range(nearest):
            neighbour = int(index[row, column])
            colour = RIGHT if int(bank.label[neighbour]) == label else WRONG
            text = f"{float(similarity[row, column]):.3f}"
            _tile(axes[row, column + 1], bank.image[neighbour], text, colour)
    voters = (normalize(queries.x, dim=1) @ normalize(bank.x, dim=1).T).topk(min(5, len(bank)))
    voted = vote(voters.values, bank.label[voters.indices], len(classes), 0.07, among)
    share = float((voted == queries.label).double().mean())
    images = "1 test image" if len(queries) == 1 else f"{len(queries)} test images"
    note = f"green: same class, red: another · 5 neighbours vote right for {share:.1%} of {images}"
    figure.text(0.04, 0.925, "Test images, their nearest training images, and the cosine", color=INK, fontsize=11)
    figure.text(0.04, 0.898, note, color=PALE, fontsize=9)


def _draw_embedding(figure: SubFigure, queries: ImageSample, classes: Sequence[str], typeface: Typeface) -> str:
    """Draws a point for each query. Returns how its place was found, in words."""
    from matplotlib import colormaps

    flat, how = _flatten(normalize(queries.x, dim=1).numpy().astype(np.float64))
    axes, labels = figure.subplots(), queries.label.numpy()
    commonest = np.argsort(-np.bincount(labels), kind="stable")[:COLOURED]
    colour = colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue] (a ListedColormap)
    others = ~np.isin(labels, commonest)
    points, names = [], []
    if others.any():
        points.append(axes.scatter(*flat[others].T, s=10, color="#d8dde1", linewidths=0))
        names.append("others")
    for i, label in enumerate(sorted(int(label) for label in commonest if (labels == label).any())):
        points.append(axes.scatter(*flat[labels == label].T, s=22, color=colour[i], alpha=0.85, linewidths=0))
        names.append(typeface.text(without_wnid(classes[label]), 16))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    # Points and names are given together, since a point's own label would be left out where it begins with "_".
    legend = axes.legend(
        points, names, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, markerscale=1.6
    )
    widest = max(text.get_window_extent().width for text in legend.get_texts()) / figure.bbox.width
    figure.subplots_adjust(left=0.03, right=0.92 - widest, top=0.86, bottom=0.03)
    return how


def _flatten(points: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
    """Unit rows (N, D) -> places (N, 2), and how they were found: by t-SNE or, where there are few different rows, as a
    projection. t-SNE divides by the spread of the rows, and ends the process by a signal where that is 0."""
    if not np.isfinite(points).all():
        return np.zeros((len(points), 2)), "not placed, as some features are infinite or no numbers"
    centred = points - points.mean(0)
    values, vectors = np.linalg.eigh(centred @ centred.T)  # ascending
    plane = np.zeros((len(points), 2))
    largest = slice(None, -3, -1)
    plane[:, : min(2, len(points))] = vectors[:, largest] * np.sqrt(values[largest].clip(min=0))
    different = len(np.unique(points.round(6), axis=0))
    if different < LEAST_DIFFERENT:
        number = "all features are the same" if different == 1 else f"only {different} different features"
        return plane, f"the first two principal components ({number}), coloured by class"
    from sklearn.manifold import TSNE

    # Euclidean distance on the unit sphere orders pairs as the cosine does.
    start = (plane / plane[:, 0].std() * 1e-4).astype(np.float32)
    perplexity = min(30.0, (len(points) - 1) / 3)
    with redirect_stdout(_Iterations()):
        flat = TSNE(init=start, perplexity=perplexity, random_state=0, verbose=2).fit_transform(points)
    return flat, "t-SNE of the normalised features, coloured by class"


class _Iterations(io.TextIOBase):
    """Reads how far t-SNE is from what it prints, every 50 iterations."""

    def __init__(self) -> None:
        self._stdout = sys.stdout
        phase("picture: iterations of t-SNE", 0, ITERATIONS)

    def write(self, text: str) -> int:
        if found := re.search(r"Iteration (\d+)", text):
            with redirect_stdout(self._stdout):
                phase("picture: iterations of t-SNE", int(found[1]), ITERATIONS)
        return len(text)


def _tile(axes: Axes, image: Tensor, text: str, colour: str) -> None:
    """Draws an image (3, H, W) uint8 with a frame and a caption."""
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest" if image.shape[-1] < 48 else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.set_title(text, color=colour, fontsize=8.5, pad=4.5)
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=2.2)


def _rows_of_many_classes(label: Tensor, count: int) -> Tensor:
    """(count,) row numbers: the first row of each class, then the second of each, and so on."""
    labels = label.numpy()
    order = np.argsort(labels, kind="stable")
    earlier = np.empty(len(labels), dtype=np.int64)  # how many rows of the same class come before
    starts = np.searchsorted(labels[order], labels[order])
    earlier[order] = np.arange(len(labels)) - starts
    return label.new_tensor(np.lexsort((labels, earlier))[:count])
