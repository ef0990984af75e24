"""Kills conversions at many images and in many states, and converts again. test_resumed_conversions.py runs it.

    python resumed_conversions.py FOLDER

Prints for each kill how many images were done already when the next conversion began, and whether the files that it
made are those of a conversion that nobody killed.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kilobatch.data.beton import verify_beton
from kilobatch.data.sources import conversion_pass
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import BrokenImage, EncodedImage
from kilobatch.data.sources.journal import journal_path

IMAGES = 200
conversion_pass.EVERY = 0.0  # a record for each image


class NamedImages(Arrays):
    """Photographs and small images in turn, of which two are broken. `killed`: the image at which the process dies."""

    names = [f"a/{i}.png" for i in range(IMAGES)]
    killed = -1
    encoded = 0

    def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
        if i == self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        self.encoded += 1
        if i in (7, 150):
            raise BrokenImage(f"image {i} is broken")
        image, label = super().encode(i, encoding)
        if i % 3 == 0:
            image = EncodedImage(0, 70, 70, bytes([i]) * 300_000, warning=f"image {i} is odd" if i % 2 else None)
        return image, label


def source(killed: int = -1, seed: int = 0) -> NamedImages:
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGES, 9, 7, 3), np.uint8)
    fields = {"tokens": np.arange(IMAGES * 2, dtype=np.int32).reshape(IMAGES, 2)}
    found = NamedImages(pixels, np.arange(IMAGES) % 4, ["a", "b", "c", "d"], fields)
    found.killed = killed
    return found


def files(out: Path) -> dict[str, bytes]:
    return {path.name[1:]: path.read_bytes() for path in sorted(out.parent.glob(f"{out.stem}*"))}


def killed_conversion(out: Path, at: int) -> None:
    child = os.fork()
    if child == 0:
        convert(source(at), out, threads=1, skip_broken=True, progress=False)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def damage_samples(out: Path) -> None:
    with out.with_name(out.name + ".partial").open("r+b") as file:
        file.seek(conversion_pass.Writer.PAGE + 10)
        file.write(b"damage")


def cut_journal(out: Path) -> None:
    os.truncate(journal_path(out), journal_path(out).stat().st_size - 5)


def add_to_files(out: Path) -> None:
    for suffix in (".partial", ".names.partial", ".tmp"):
        with out.with_name(out.name + suffix).open("ab") as file:
            file.write(b"of a write that was not synced" * (1 if suffix == ".tmp" else 400_000))


def cut_names(out: Path) -> None:
    os.truncate(out.with_name(out.name + ".names.partial"), 3)


def main(folder: Path) -> None:
    expected = folder / "x.beton"
    convert(source(), expected, skip_broken=True, progress=False)
    whole = files(expected)
    nothing: Callable[[Path], object] = lambda out: None  # noqa: E731
    cases: list[tuple[str, list[int], Callable[[Path], object]]] = [
        (f"killed at {at}", [at], nothing) for at in (1, 111)
    ]
    cases += [("killed twice", [70, 160], nothing), ("samples damaged", [111], damage_samples)]
    cases += [("journal cut", [111], cut_journal), ("more in the files", [111], add_to_files)]
    cases += [("names cut", [111], cut_names)]
    for name, kills, then in cases:
        out = folder / "y.beton"
        for at in kills:
            killed_conversion(out, at)
        assert not out.exists()
        then(out)
        again = source()
        convert(again, out, skip_broken=True, progress=False)
        verify_beton(out, full=True)
        print(f"{name}: {IMAGES - again.encoded} done, {'same' if files(out) == whole else 'other'}", flush=True)
        for path in folder.glob("y*"):
            path.unlink()
    killed_conversion(folder / "y.beton", 111)
    other = source(seed=1)
    convert(other, folder / "y.beton", skip_broken=True, progress=False)
    print(f"other images: {IMAGES - other.encoded} done", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
