"""Converts B over A many times, and is killed at another moment each time. test_convert.py runs it as a process.

    python killed_conversions.py FOLDER

An audit hook sees each opening, renaming and removing of a file before it is done; the child kills itself at the n-th.
Prints one line per kill: where it was, and what a quick and a full check then say of the file.
"""

import os
import resource
import signal
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.beton import verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import EncodedImage


class KillingArrays(Arrays):
    """Images of which the one of index 40 of 64 kills the process."""

    def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
        if i == 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(i, encoding)


def images(value: int) -> tuple[NDArray[np.uint8], NDArray[np.int64], list[str]]:
    return np.full((64, 16, 16, 3), value, np.uint8), np.full(64, value, np.int64), ["a", "b"]


def kill_self_at(n: int, folder: Path) -> None:
    left = n

    def audit(event: str, arguments: tuple) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(str(folder)):
            left -= 1
            if left < 0:
                os.write(1, f"{event} {Path(arguments[0]).name}: ".encode())
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def in_child(work) -> bool:  # noqa: ANN001
    """Runs `work` in a child process. Returns whether the child ended by itself."""
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def state(out: Path) -> str:
    """'A', 'B' or 'refused'. A file that passes the quick check must pass the full one, and have its own .json."""
    try:
        info = verify_beton(out)
    except UserError:
        return "refused"
    verify_beton(out, full=True)
    label = int(np.frombuffer(out.read_bytes(), "<i8", 1, 24 + 2 * 1041 + 16)[0])
    assert info.classes == ["a", "b"] and info.samples == 64
    return "AB"[label]


def main(folder: Path) -> None:
    out = folder / "x.beton"
    for n in range(99):
        convert(Arrays(*images(0)), out, progress=False)

        def work(n: int = n) -> None:
            kill_self_at(n, folder)
            convert(Arrays(*images(1)), out, progress=False)

        finished = in_child(work)
        print("finished" if finished else "killed", state(out), flush=True)
        if finished:
            break

    out = folder / "y.beton"
    assert not in_child(lambda: convert(KillingArrays(*images(0)), out, progress=False))
    print("while writing:", sorted(path.name for path in folder.glob("y*")), state(folder / "y.beton.partial"))
    convert(Arrays(*images(0)), out, progress=False)
    print("again:", sorted(path.name for path in folder.glob("y*")), state(out))

    out = folder / "z.beton"
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 23, resource.RLIM_INFINITY))  # the samples begin at 8 MiB
    try:
        convert(Arrays(*images(0)), out, progress=False)
    except UserError as error:
        print("no room:", sorted(path.name for path in folder.glob("z*")), error)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
