"""Looks at workers that run the programs of tests/programs: which are alive, and what they wrote."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(folder: Path, workers: int) -> list[int]:
    """Ranks that have started and still run."""
    pids = {rank: folder / f"pid-{rank}" for rank in range(workers)}
    return [rank for rank, pid in pids.items() if pid.exists() and pid.read_text() and _runs(int(pid.read_text()))]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def log_lines(folder: Path, rank: int) -> list[str]:
    """A rank's log; each line after the time at which it came."""
    lines = (folder / "logs" / f"rank-{rank}.log").read_text().splitlines()
    for line in lines:
        came = datetime.strptime(line[:24], "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=UTC)
        assert abs((datetime.now(UTC) - came).total_seconds()) < 600
    times = [line[:24] for line in lines]
    assert times == sorted(times)
    return [line[25:] for line in lines]
