"""A control group with a memory limit, in which the kernel kills for real."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CGROUPS = Path("/sys/fs/cgroup")


@contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """Makes a group with a limit of so many bytes, for processes that write their number into its cgroup.procs. Skips
    the test where no group can be made."""
    old = (CGROUPS / "memory").is_dir()
    group = CGROUPS / ("memory" if old else "") / f"kilobatch-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no control group with a memory limit can be made here: {error}")
    try:
        yield group
    finally:
        deadline = time.monotonic() + 100
        while (group / "cgroup.procs").read_text() and time.monotonic() < deadline:  # they end
            time.sleep(0.1)
        group.rmdir()
