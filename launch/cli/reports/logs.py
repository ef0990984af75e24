"""`kilobatch logs`: prints what all ranks wrote, with the start and end of each attempt, by time. Loads no torch."""

import heapq
import os
import re
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from kilobatch.data.errors import UserError
from kilobatch.launch.processes import failure_files
from kilobatch.launch.processes.output import tell
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import Attempt
from kilobatch.launch.schedulers.select import scheduler_of

POLL_SECONDS = 1.0  # between two reads of the files
ASK_SCHEDULER_SECONDS = 10.0  # between two requests to the scheduler
BLOCK = 1 << 18  # bytes read at a time
_STAMP = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3})Z ?")


class LogLine(NamedTuple):
    """A line of output. stamp: its time, UTC, ISO 8601 to the millisecond; source: who wrote it, such as `rank 0`."""

    stamp: str
    source: str
    text: str


class LogFile:
    """The log of one rank, read from where the last call ended. Its lines begin with a time stamp; a line without one
    belongs to the line before it."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self._offset, self._stamp = 0, ""

    def skip(self, last: int) -> None:
        """Leaves out all lines but the `last` ones."""
        with self.path.open("rb") as file:
            end = start = file.seek(0, os.SEEK_END)
            data = b""
            while start and data.count(b"\n") <= last:
                size = min(BLOCK, start)
                file.seek(start - size)
                data = file.read(size) + data
                start -= size
        *lines, partial = data.split(b"\n")
        self._offset = end - len(partial) - sum(len(line) + 1 for line in lines[max(0, len(lines) - last) :])

    def new(self) -> Iterator[LogLine]:
        """The complete lines that have been written since the last call. The file is open only while a block is read:
        there may be more ranks than a process may have open files."""
        while True:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                block = file.read(BLOCK)
            *lines, partial = block.split(b"\n")
            if not lines:
                if len(block) < BLOCK:
                    return
                lines, partial = [partial], b""  # a line longer than a block comes in pieces
            self._offset += len(block) - len(partial)
            for line in lines:
                text = line.decode(errors="replace")
                if stamped := _STAMP.match(text):
                    self._stamp, text = stamped[1], text[stamped.end() :]
                yield LogLine(self._stamp, self.source, text)


class MergedLogs:
    """The logs of all ranks together with the events of the run's attempts; or, with `rank`, the log of that rank."""

    def __init__(self, folder: Path, rank: int | None) -> None:
        self._folder, self._rank = folder, rank
        self._logs: dict[Path, LogFile] = {}
        self._returned: set[tuple[int, str]] = set()  # events, by attempt and kind
        self._find_files()

    def skip(self, last: int) -> None:
        for log in self._logs.values():
            log.skip(last)

    def new(self) -> Iterator[LogLine]:
        """The lines and events since the last call, by time."""
        self._find_files()
        logs = [log.new() for log in self._logs.values()]
        return heapq.merge(*logs, [] if self._rank is not None else self._events(), key=lambda entry: entry.stamp)

    def _find_files(self) -> None:
        for rank, path in _rank_logs(self._folder):
            if path not in self._logs and self._rank in (None, rank):
                self._logs[path] = LogFile(path, f"rank {rank}")

    def _events(self) -> list[LogLine]:
        events = []
        for attempt in job_history.read_attempts(self._folder):
            for kind, stamp, text in _events_of(attempt):
                if (attempt.attempt, kind) not in self._returned:
                    self._returned.add((attempt.attempt, kind))
                    events.append(LogLine(stamp, "job", text))
        return sorted(events)


def _rank_logs(folder: Path) -> list[tuple[int, Path]]:
    """The rank and the log of each worker, by rank. A link that leads nowhere is no log yet."""
    paths = (folder / "logs").glob("rank-*.log")
    numbered = [(int(match[1]), path) for path in paths if (match := re.fullmatch(r"rank-(\d+)", path.stem))]
    return sorted((rank, path) for rank, path in numbered if path.exists())


def _events_of(attempt: Attempt) -> Iterator[tuple[str, str, str]]:
    """The kind, the time and the text of each event of an attempt. attempts.jsonl has whole seconds, rounded down: so
    that a start comes before the lines of its second and an end after them, they get milliseconds 000 and 999."""
    name = f"attempt {attempt.attempt}"
    where = f"job {attempt.job} on {', '.join(attempt.nodes)}, {attempt.workers} workers, from step {attempt.from_step}"
    yield "began", f"{attempt.began[:19]}.000", f"{name} began: {where}"
    if attempt.asked:
        yield "asked", f"{attempt.asked[:19]}.999", f"{name} was asked to stop: {attempt.signal}"
    if attempt.ended:
        who = f"rank {attempt.rank} on {attempt.host}: " if attempt.rank is not None else ""
        sequel = "requeued" if attempt.requeued else attempt.stopped
        words = [f"{name} ended: {attempt.reason}", f"step {attempt.step}", who + attempt.how if attempt.how else None]
        yield (
            "ended",
            f"{attempt.ended[:19]}.999",
            ", ".join(filter(None, [*words, job_history.last_line(attempt.lines), sequel])),
        )


def logs(run: str, *, follow: bool, rank: int | None, lines: int | None) -> None:
    """Prints a run's logs, merged by time.

    follow: go on until the run is over, through requeues; rank: print the log of this rank only; lines: how many lines
    to print, the last ones. Raises UserError for a run or a rank that does not exist.
    """
    folder = run_folder.find_run(run)
    if lines is not None and lines < 0:
        raise UserError(f"--lines {lines} is less than none")
    merged = MergedLogs(folder, rank)
    try:
        if lines is not None:
            merged.skip(lines)
        if not _print(deque(merged.new(), maxlen=lines) if lines is not None else merged.new()) and lines != 0:
            _print_state(folder, rank)
        if follow:
            _follow(folder, merged)
        elif rank is None:
            _tell_other_files(folder / "logs")
    except BrokenPipeError:  # the reader has ended, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:  # the way to end --follow
        return


def _print(entries: Iterable[LogLine]) -> bool:
    """Prints the lines. Returns whether there were any."""
    printed = False
    for stamp, source, text in entries:
        print(f"{stamp.replace('T', ' ')} {source:>7} | {text}" if stamp else f"{source:>7} | {text}")
        printed = True
    sys.stdout.flush()
    return printed


def _follow(folder: Path, merged: MergedLogs) -> None:
    """Prints new lines until the run is over. The files are read often, the scheduler is asked seldom."""
    asked_at = 0.0
    while True:
        over = run_folder.read_state(folder).status not in ("queued", "running")
        if not over and time.monotonic() - asked_at >= ASK_SCHEDULER_SECONDS:
            over = run_folder.status(folder) not in ("queued", "running")
            asked_at = time.monotonic()
        _print(merged.new())
        if over:
            return
        time.sleep(POLL_SECONDS)


def _tell_other_files(logs: Path) -> None:
    """Names what the logs' folder holds beside the logs, where workers have failed or hung."""
    errors, dumps = sorted(logs.glob("rank-*.error.json")), failure_files.flight_recorder_files(logs)
    for files, what in ((errors, "with the error of a rank"), (dumps, "with the last collectives of a rank")):
        if files:
            several = f", {len(files)} such files" if len(files) > 1 else ""
            tell(f"kilobatch: also there, {what}: {files[0]}{several}")


def _print_state(folder: Path, rank: int | None) -> None:
    """For a run without a line of log: prints why its job waits, and what the job wrote before it had workers."""
    ranks = [rank for rank, _ in _rank_logs(folder)]
    if rank is not None and ranks and rank not in ranks:
        raise UserError(f"{folder} has no log of rank {rank}; it has ranks {ranks[0]} to {ranks[-1]}")
    submitted = job_history.read_job_file(folder)
    if submitted is None or not submitted.job_id:
        print(f"{folder} has written nothing yet: {run_folder.status(folder)}", flush=True)
        return
    job = scheduler_of(submitted.cluster).states([submitted.job_id])[submitted.job_id]
    status = run_folder.status(folder, job)
    why = f" ({job.why})" if job.why else ""
    print(f"{folder} has written nothing yet: {status} as job {submitted.job_id}{why}", flush=True)
    for path in sorted(_outputs(folder, submitted.job_id)):
        print(f"{path}:\n{path.read_text(errors='replace').rstrip()}", flush=True)


def _outputs(folder: Path, job_id: str) -> Iterator[Path]:
    """The files that a job's tasks wrote before they had workers; the runs of a sweep share a folder for them."""
    for top in (folder, folder.parent):
        paths = (top / "submitit").glob("local.log" if job_id.startswith("local") else f"{job_id}_*log.out")
        yield from (path for path in paths if path.is_file())
