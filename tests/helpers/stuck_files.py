"""A file system that never answers, so that whoever looks at a file in it is stuck in the kernel: `python -m
tests.helpers.stuck_files FOLDER` mounts it, and prints a line then. Its end sets them free. Needs root."""

import ctypes
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_INIT = 26  # a request of linux/fuse.h
_DETACH = 2


@contextmanager
def stuck_folder(folder: Path) -> Iterator[None]:
    """Mounts the file system at `folder`. Skips the test where this is not allowed."""
    if os.getuid() != 0 or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("mounting a file system takes root and /dev/fuse")
    folder.mkdir()
    command = [sys.executable, "-m", "tests.helpers.stuck_files", str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert server.stdout is not None
    try:
        if server.stdout.readline() != "mounted\n":
            pytest.skip("mounting a file system is not allowed here")
        yield
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        ctypes.CDLL(None).umount2(os.fsencode(folder), _DETACH)


def main() -> None:
    folder = sys.argv[1]
    requests = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={requests},rootmode=40000,user_id=0,group_id=0".encode()
    if ctypes.CDLL(None).mount(b"stuck", os.fsencode(folder), b"fuse", 0, options) != 0:
        sys.exit("not mounted")
    print("mounted", flush=True)
    while True:
        request = os.read(requests, 1 << 20)
        _, kind, unique = struct.unpack_from("=IIQ", request)
        if kind == _INIT:
            # Version 7.31, no features, one request at a time; the rest of the answer is zero.
            answer = struct.pack("=IIII", 7, 31, 0, 0) + struct.pack("=HHII", 1, 1, 4096, 1) + bytes(36)
            os.write(requests, struct.pack("=IiQ", 16 + len(answer), 0, unique) + answer)


if __name__ == "__main__":
    main()
