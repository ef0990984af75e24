"""Preprocess against the evaluators' loader on the same images: the same bits, whatever kind of file they lie in."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.data.loading.loader import LoaderWorker, PlainLoader
from kilobatch.data.loading.preprocess import Preprocess
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.encoding import encoding_for_views
from kilobatch.data.sources.specs import open_source
from kilobatch.data.views.options import Views
from tests.helpers.loaders import CPU, photo

SMALL = Views(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
CENTRAL = Views(size=96, interpolation="bicubic")


def loaded(source: str, folder: Path, views: Views) -> Tensor:
    """(N, 3, size, size): the images of a source as evaluators see them."""
    beton = folder / f"{views.size}.beton"
    convert(open_source(source, "train"), beton, encoding=encoding_for_views(views.size), progress=False)
    worker = LoaderWorker(0, 1, 1, CPU)
    loader = PlainLoader(beton, views.size, views.mean, views.std, worker, batch=4, interpolation=views.interpolation)
    return torch.cat([batch.views[0][:, 0] for batch in loader])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One image of each kind that a conversion treats differently, by name."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "c").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    photo(0, 150, 110).save(folder / "c" / "a-kept.jpg", quality=95)
    photo(1, 1500, 700).save(folder / "c" / "b-shrunk.jpg")
    photo(2, 130, 170).save(folder / "c" / "c-turned.jpg", exif=turned)
    photo(3, 120, 160).save(folder / "c" / "d-encoded.png")
    photo(4, 50, 40).save(folder / "c" / "e-pixels.png")
    photo(5, 100, 100).convert("L").save(folder / "c" / "f-grey.jpg", progressive=True)
    return folder


@pytest.mark.parametrize("views", [SMALL, CENTRAL], ids=["all of an image", "its central part, bicubic"])
def test_files_as_the_evaluators_see_them(views: Views, files: Path, tmp_path: Path) -> None:
    expected, preprocess = loaded(f"folder:{files}", tmp_path, views), Preprocess(views)
    paths = sorted((files / "c").iterdir())
    assert len(paths) == len(expected) == 6
    for path, want in zip(paths, expected, strict=True):
        assert torch.equal(preprocess(path), want) and torch.equal(preprocess(str(path)), want), path.name
        with Image.open(path) as image:
            assert torch.equal(preprocess(image), want), path.name
            assert image.convert("RGB").size == image.size  # it can still be decoded
        assert torch.equal(preprocess(Image.open(io.BytesIO(path.read_bytes()))), want), path.name


@pytest.mark.parametrize("side", [20, 100])
def test_arrays_as_the_evaluators_see_them(side: int, tmp_path: Path) -> None:
    images = np.stack([np.asarray(photo(i, side, side)) for i in range(3)])
    np.savez(tmp_path / "a.npz", images=images, labels=np.zeros(3, np.int64))
    expected, preprocess = loaded(f"npz:{tmp_path}/a.npz", tmp_path, SMALL), Preprocess(SMALL)
    assert torch.equal(torch.stack([preprocess(image) for image in images]), expected)
    grey = images[0, :, :, 0]
    assert torch.equal(preprocess(grey), preprocess(np.repeat(grey[:, :, None], 3, 2)))
    assert torch.equal(preprocess(grey[:, :, None]), preprocess(grey))


def test_a_decoded_image_is_near(files: Path) -> None:
    """Pillow's JPEG decoder is not the loader's; what has been decoded is taken as its pixels, and turned upright."""
    preprocess = Preprocess(Views(size=96, mean=(0, 0, 0), std=(1, 1, 1)))
    for name in ("a-kept.jpg", "c-turned.jpg", "e-pixels.png"):
        path = files / "c" / name
        off = (preprocess(Image.open(path).convert("RGB")) - preprocess(path)).abs().mul(255)
        assert off.mean() < 1.5 and off.max() < 12, name
        assert off.max() == 0 or name != "e-pixels.png"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (3, "is a int; give a PIL image, a path, or a uint8 array"),
        (np.zeros((4, 4, 3)), r"is an array \(4, 4, 3\) of float64; give"),
        (np.zeros((3, 8, 4), np.uint8), r"is an array \(3, 8, 4\) of uint8; give"),
        (Image.new("I;16", (9, 9)), "more than 8 bits a channel"),
        ("nowhere/a.jpg", "nowhere/a.jpg cannot be read"),
    ],
)
def test_refusals(image: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Preprocess(SMALL)(image)  # pyright: ignore[reportArgumentType]


def test_it_says_what_it_does() -> None:
    assert repr(Preprocess(CENTRAL)) == (
        "Preprocess(the central square of 87.5% of the shorter side, resized to 96 x 96 (bicubic, antialiased), "
        "mean [0.485, 0.456, 0.406] and std [0.229, 0.224, 0.225] of values from 0 to 1)"
    )
    assert "the whole image, resized to 32 x 32" in repr(Preprocess(SMALL))
