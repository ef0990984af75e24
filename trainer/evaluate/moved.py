"""k-NN on moved test images, for which raw pixels are poor features.

k-NN (k 5, cosine) from clean training images to test images, each of which is turned by up to ±20°, shifted by up to
±25 % of half the side, scaled by ±25 % and sheared by 0.2, once and by a fixed seed. The features are the pixels
themselves, those of the encoder before training and those of the trained encoder. All three are also evaluated on the
clean test images, which shows how much accuracy the moving costs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from kilobatch.data.augment.cpu.augment import affine_batch
from kilobatch.data.batch import Batch
from kilobatch.data.tensor_rng import keys
from kilobatch.data.views.options import Affine
from kilobatch.trainer.evaluate.features import Images, Represent, extract
from kilobatch.trainer.evaluate.images import Triple, to_bytes
from kilobatch.trainer.evaluate.knn import accuracy
from kilobatch.trainer.evaluate.options import KNNOptions

# ±25 % in the coordinates of affine grids, which run from -1 to 1: an eighth of the side. At a quarter of the side
# parts of most digits leave the image, and pixels are right for 32 % instead of 64 %.
MOVES = Affine(probability=1.0, degrees=20.0, shift=0.125, scale=(0.75, 1.25), shear=0.2)
SEED = 20  # of the moves; not the run's seed, so that all runs are evaluated on the same images
NEIGHBOURS = KNNOptions(k=5)


class Moved:
    """The images, each moved once. How an image is moved depends on its index alone, not on ranks or batches."""

    def __init__(self, images: Images, mean: Triple, std: Triple):
        self.images, self.mean, self.std = images, mean, std
        self.samples = images.samples

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.images:
            clean = to_bytes(batch.views[0][:, 0], self.mean, self.std).permute(0, 2, 3, 1).cpu().numpy()
            each = keys(SEED, 0, batch.index.cpu(), 1).flatten().numpy().view(np.uint64)
            moved = affine_batch(clean, each, MOVES)
            views = _normalised(torch.from_numpy(moved).permute(0, 3, 1, 2), self.mean, self.std)
            yield batch.replaced(views=(views[:, None].to(batch.index.device),))


def evaluate(
    trained: Represent,
    untrained: Represent,
    train: Images,
    test: Images,
    mean: Triple,
    std: Triple,
    among: Sequence[int] | None = None,
) -> Iterator[tuple[str, float]]:
    """Yields the top-1 accuracies moved/{clean,moved}/{pixels,untrained,trained}, in 0..1 over all ranks.

    untrained: the encoder as the run's seed initialised it. mean, std: what the images are normalised with;
    among: the classes whose votes count, None: all.
    """

    def pixels(batch: Batch) -> Tensor:
        return to_bytes(batch.views[0][:, 0], mean, std).flatten(1).float()

    moved = Moved(test, mean, std)
    for name, represent in (("pixels", pixels), ("untrained", untrained), ("trained", trained)):
        bank = extract(represent, train)
        yield f"moved/clean/{name}", accuracy(bank, extract(represent, test), NEIGHBOURS, among)
        yield f"moved/moved/{name}", accuracy(bank, extract(represent, moved), NEIGHBOURS, among)


def table(values: dict[str, float], voting: str = f"k {NEIGHBOURS.k}", chance: float | None = None) -> Table:
    """A table of the six numbers of evaluate(). voting: the settings and images of the k-NN, for its title; chance: the
    accuracy of guessing a class, None: it is left out."""
    result = Table(title=f"k-NN from clean training images ({voting})", title_justify="left")
    result.add_column("test images")
    for name in ("raw pixels", "untrained encoder", *(["chance"] if chance is not None else []), "trained encoder"):
        result.add_column(name, justify="right")
    for test in ("clean", "moved"):
        shares = [values[f"moved/{test}/{name}"] for name in ("pixels", "untrained", "trained")]
        shares[2:2] = [] if chance is None else [chance]
        cells = [f"{share:.1%}" for share in shares]
        if shares[-1] == max(shares):
            cells[-1] = f"[bold green]{cells[-1]}[/]"
        result.add_row(test, *cells)
    return result


def _normalised(images: Tensor, mean: Triple, std: Triple) -> Tensor:
    """(N, 3, H, W) uint8 -> float32, normalised: the inverse of to_bytes."""
    shift, scale = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    return (images.float() / 255 - shift) / scale
