"""`kilobatch logs`: what all ranks wrote, and what became of each attempt, merged by time. Loads no torch."""

import heapq
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from kilobatch.data.errors import Refusal
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs import run_folder as runs
from kilobatch.launch.runs.job_history import Attempt
from kilobatch.launch.schedulers.select import scheduler_of

LOOK = 1.0  # seconds between two looks at the files
ASK = 10.0  # seconds between two questions to the scheduler
BLOCK = 1 << 18  # bytes read at a time
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z ?")


class Entry(NamedTuple):
    """stamp: UTC, ISO 8601 to the millisecond; source: such as `rank 0`."""

    stamp: str
    source: str
    text: str


class Log:
    """A file of lines that begin with a stamp; one that does not belongs to the line before it."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self._offset, self._stamp = 0, ""

    def skip(self, kept: int) -> None:
        """Goes on `kept` lines before the end."""
        with self.path.open("rb") as file:
            end = start = file.seek(0, os.SEEK_END)
            data = b""
            while start and data.count(b"\n") <= kept:
                size = min(BLOCK, start)
                file.seek(start - size)
                data = file.read(size) + data
                start -= size
        *lines, half = data.split(b"\n")
        self._offset = end - len(half) - sum(len(line) + 1 for line in lines[max(0, len(lines) - kept) :])

    def new(self) -> Iterator[Entry]:
        """The whole lines since the last call. The file is open only while a block is read: there may be more ranks
        than a process may have open files."""
        while True:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                block = file.read(BLOCK)
            *lines, half = block.split(b"\n")
            if not lines:
                if len(block) < BLOCK:
                    return
                lines, half = [half], b""  # a line longer than a block comes in pieces
            self._offset += len(block) - len(half)
            for line in lines:
                text = line.decode(errors="replace")
                if stamped := _STAMP.match(text):
                    self._stamp, text = stamped[1], text[stamped.end() :]
                yield Entry(self._stamp, self.source, text)


class Merged:
    """A run's logs, or one rank's, and without a choice of rank the attempts of its jobs."""

    def __init__(self, folder: Path, rank: int | None) -> None:
        self._folder, self._rank = folder, rank
        self._logs: dict[Path, Log] = {}
        self._told: set[tuple[int, str]] = set()
        self._look()

    def skip(self, kept: int) -> None:
        for log in self._logs.values():
            log.skip(kept)

    def new(self) -> Iterator[Entry]:
        """What has come since the last call, by time."""
        self._look()
        logs = [log.new() for log in self._logs.values()]
        return heapq.merge(*logs, [] if self._rank is not None else self._events(), key=lambda entry: entry.stamp)

    def _look(self) -> None:
        for path in (self._folder / "logs").glob("rank-*.log"):
            rank = int(path.stem.removeprefix("rank-"))
            if path not in self._logs and self._rank in (None, rank):
                self._logs[path] = Log(path, f"rank {rank}")

    def _events(self) -> list[Entry]:
        events = []
        for attempt in ledger.read(self._folder):
            for what, stamp, text in _told(attempt):
                if (attempt.attempt, what) not in self._told:
                    self._told.add((attempt.attempt, what))
                    events.append(Entry(stamp, "job", text))
        return sorted(events)


def _told(attempt: Attempt) -> Iterator[tuple[str, str, str]]:
    """What to tell of an attempt: what it is, when, in words. The ledger's times are whole seconds, rounded down."""
    name = f"attempt {attempt.attempt}"
    where = f"job {attempt.job} on {', '.join(attempt.nodes)}, {attempt.workers} workers, from step {attempt.from_step}"
    yield "began", f"{attempt.began[:19]}.000", f"{name} began: {where}"
    if attempt.asked:
        yield "asked", f"{attempt.asked[:19]}.999", f"{name} was asked to stop: {attempt.signal}"
    if attempt.ended:
        who = f"rank {attempt.rank} on {attempt.host}: " if attempt.rank is not None else ""
        said = next((line.strip() for line in reversed(attempt.lines) if line.strip()), None)
        then = "requeued" if attempt.requeued else attempt.stopped
        words = [f"{name} ended: {attempt.reason}", f"step {attempt.step}", who + attempt.how if attempt.how else None]
        yield "ended", f"{attempt.ended[:19]}.999", ", ".join(filter(None, [*words, said, then]))


def logs(run: str, *, follow: bool, rank: int | None, lines: int | None) -> None:
    """Prints a run's log; follow: until it is over, through requeues; rank: of this one alone; lines: the last ones.

    Raises Refusal for a run or a rank that is not there.
    """
    folder = runs.find(run)
    if lines is not None and lines < 0:
        raise Refusal(f"--lines {lines} is less than none")
    merged = Merged(folder, rank)
    try:
        if lines is not None:
            merged.skip(lines)
        if not _print(deque(merged.new(), maxlen=lines) if lines is not None else merged.new()) and lines != 0:
            _print_what_is_known(folder, rank)
        if follow:
            _follow(folder, merged)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:  # how one leaves
        return


def _print(entries: Iterable[Entry]) -> bool:
    """Whether there were any."""
    any_ = False
    for stamp, source, text in entries:
        print(f"{stamp.replace('T', ' ')} {source:>7} | {text}" if stamp else f"{source:>7} | {text}")
        any_ = True
    sys.stdout.flush()
    return any_


def _follow(folder: Path, merged: Merged) -> None:
    """Until the run is over. Files are looked at often, the scheduler is asked seldom."""
    asked = 0.0
    while True:
        over = runs.state(folder).status not in ("queued", "running")
        if not over and time.monotonic() - asked >= ASK:
            over = runs.status(folder) not in ("queued", "running")
            asked = time.monotonic()
        _print(merged.new())
        if over:
            return
        time.sleep(LOOK)


def _print_what_is_known(folder: Path, rank: int | None) -> None:
    """Of a run without a line of log: where its job waits, or what the scheduler wrote of one that did not get far."""
    ranks = sorted(int(path.stem.removeprefix("rank-")) for path in (folder / "logs").glob("rank-*.log"))
    if rank is not None and ranks and rank not in ranks:
        raise Refusal(f"{folder} has no log of rank {rank}; it has ranks {ranks[0]} to {ranks[-1]}")
    submitted = ledger.job_file(folder)
    if submitted is None or not submitted.job_id:
        print(f"{folder} has written nothing yet: {runs.status(folder)}", flush=True)
        return
    job = scheduler_of(submitted.cluster).states([submitted.job_id])[submitted.job_id]
    status = runs.status(folder, job)
    why = f" ({job.why})" if job.why else ""
    print(f"{folder} has written nothing yet: {status} as job {submitted.job_id}{why}", flush=True)
    for path in sorted(_outputs(folder, submitted.job_id)):
        print(f"{path}:\n{path.read_text(errors='replace').rstrip()}", flush=True)


def _outputs(folder: Path, job_id: str) -> Iterator[Path]:
    """What a job's tasks wrote before there were workers; a sweep keeps them together."""
    for top in (folder, folder.parent):
        yield from (top / "submitit").glob("local.log" if job_id.startswith("local") else f"{job_id}_*log.out")
