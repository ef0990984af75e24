"""Converts many entries that are generated, and prints the bytes of memory for each. test_conversion_memory.py runs it.

    python many_entries.py FOLDER ENTRIES

The process is given 200 bytes of data for each entry, and 300 MB, beyond what it has when it begins.
"""

import re
import resource
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.crc32c import crc32c
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import EncodedImage
from kilobatch.data.sources.image_list import ImageList
from kilobatch.data.sources.specs import open_source

PIXELS = bytes(3)


class GeneratedList(ImageList):
    """A list whose images are made when they are asked for."""

    def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
        return EncodedImage(1, 1, 1, PIXELS), int(self._labels[i])

    def fingerprint(self) -> str:
        return "generated"


def status(key: str) -> int:
    """Bytes of memory of this process by the kernel's name."""
    found = re.search(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def main(folder: Path, entries: int) -> None:
    crc32c(np.zeros(3, np.uint8))
    small: NDArray[np.uint8] = np.zeros((4, 1, 1, 3), np.uint8)
    convert(Arrays(small, np.zeros(4, int), ["a"]), folder / "first.beton", progress=False)  # loads what is needed
    with (folder / "list.txt").open("w") as lines:
        for i in range(entries):
            lines.write(f"n{i % 1000:08}/n{i % 1000:08}_{i:07}.JPEG\tn{i % 1000:08}\n")
    before = status("VmRSS")
    most = status("VmData") + 200 * entries + 300_000_000
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    started = time.monotonic()
    source = open_source(f"list:{folder}/list.txt", "train")
    opened, listed = status("VmHWM") - before, time.monotonic() - started
    source.__class__ = GeneratedList
    info = convert(source, folder / "many.beton", threads=2, progress=False)
    assert info.samples == entries and len(info.classes) == 1000
    whole, took = status("VmHWM") - before, time.monotonic() - started
    print(f"opened {opened / entries:.0f} converted {whole / entries:.0f} bytes, {listed:.1f} s, {took:.1f} s")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
