"""Workers on this machine: started together, watched, ended together."""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from launch.echo import Echo, tell

INTERRUPTED = 75  # the exit code of a worker that was asked to stop, has saved, and left (sysexits' EX_TEMPFAIL)
REFUSED = 2  # the exit code of a worker that met a refusal and has printed it
GRACE = 5.0  # seconds between SIGTERM and SIGKILL for the workers that a failed one leaves behind
LAST_LINES = 20
# glibc gives large blocks back to the kernel at once and takes them anew, zeroed page by page: a third of a small
# network's step on a CPU. Activations have the same sizes in every step, so they are kept.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


class WorkerFailed(RuntimeError):
    """The first worker to fail: its rank, how it ended and its last lines."""


class WorkerRefused(RuntimeError):
    """A worker met what a user can mend. Its message; empty if it stands on this terminal already."""


@dataclass
class _Worker:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int  # bytes in the log before this start

    def signal(self, number: signal.Signals) -> None:
        """To the worker and whatever it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def lines(self) -> list[str]:
        """What it has written."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace").splitlines()


def run(folder: Path, workers: int, module: str, arguments: list[str]) -> bool:
    """Runs `python -m <module> <arguments>` in `workers` processes and waits for them all.

    Each gets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, its share of the
    CPUs as OMP_NUM_THREADS, and writes `folder/logs/rank-K.log`; rank 0 speaks on this terminal too.

    SIGINT, SIGTERM or SIGHUP here becomes SIGTERM there, and workers save and leave; a second SIGINT or SIGTERM kills
    them. However this function or this process ends, no worker outlives it.

    Returns: whether they finished; False if they were asked to stop and did.
    Raises WorkerRefused when one ends with REFUSED, WorkerFailed when one ends in any other way; the others get
    SIGTERM, and after GRACE seconds SIGKILL.
    """
    # The store lives here and has its port already: workers only connect, so that no other process can take the port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started: list[_Worker] = []
    with _Asked() as asked, Echo.to_this_terminal(folder / "logs" / "rank-0.log") as echo:
        try:
            for rank in range(workers):
                started.append(_start(rank, workers, store.port, folder, [module, *arguments], echo))
            echo.opened()
            return _watch(started, asked, echo)
        finally:
            for worker in started:
                worker.signal(signal.SIGKILL)
                worker.process.wait()


def _start(rank: int, workers: int, port: int, folder: Path, command: list[str], echo: Echo) -> _Worker:
    log = folder / "logs" / f"rank-{rank}.log"
    log.touch()
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    environment = {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"} | KEEP_MEMORY | os.environ
    environment |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 connects to the store as well, instead of opening one
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONUNBUFFERED": "1",
    }
    start = log.stat().st_size
    with log.open("ab") as file:
        output = echo.workers_end if rank == 0 else file
        process = subprocess.Popen(
            [sys.executable, "-m", "launch.leash", str(os.getpid()), *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C reaches the launcher alone, which asks the workers
        )
    return _Worker(rank, process, log, start)


def _watch(workers: list[_Worker], asked: "_Asked", echo: Echo) -> bool:
    with _deaths(workers) as selector:
        selector.register(echo, selectors.EVENT_READ, None)
        alive, told, interrupted = len(workers), 0, False
        while alive:
            if asked.times > told:
                told = asked.times
                for worker in workers:
                    worker.signal(signal.SIGTERM if told == 1 else signal.SIGKILL)
            for key, _ in selector.select(timeout=0.2):
                worker = key.data
                if worker is None:
                    if not echo.forward():
                        selector.unregister(echo)
                    continue
                selector.unregister(key.fileobj)
                code = worker.process.wait()
                alive -= 1
                left_early = code == INTERRUPTED or (told > 0 and code in (-signal.SIGTERM, -signal.SIGINT))
                if told > 1 and code == -signal.SIGKILL:
                    left_early = True
                if code != 0 and not left_early:
                    raise _failure(workers, worker, code, echo)
                if code < 0:  # during its start-up, or by the second request: the others would wait for it for good
                    _end(workers, echo)
                    return False
                interrupted = interrupted or left_early
        echo.drain()
    return not interrupted


@contextmanager
def _deaths(workers: list[_Worker]) -> Iterator[selectors.BaseSelector]:
    """A selector that wakes at each worker's end, at once, so that the first to fail is seen first."""
    descriptors = [os.pidfd_open(worker.process.pid) for worker in workers]
    try:
        with selectors.DefaultSelector() as selector:
            for descriptor, worker in zip(descriptors, workers, strict=True):
                selector.register(descriptor, selectors.EVENT_READ, worker)
            yield selector
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _end(workers: list[_Worker], echo: Echo) -> None:
    """The others hang in a collective, or soon will."""
    for worker in workers:
        worker.signal(signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline and any(worker.process.poll() is None for worker in workers):
        time.sleep(0.02)
        echo.drain()
    for worker in workers:
        worker.signal(signal.SIGKILL)
        worker.process.wait()
    echo.drain()


def _failure(workers: list[_Worker], first: _Worker, code: int, echo: Echo) -> WorkerRefused | WorkerFailed:
    """Ends the others. A refusal goes before the failure of a worker that lost its peer by it."""
    refused = [worker for worker in workers if worker.process.poll() == REFUSED]
    _end(workers, echo)
    if not refused:
        return WorkerFailed(_epitaph(first, code))
    # The others may have met the same in the meantime; what rank 0 says stands on this terminal.
    return WorkerRefused("" if workers[0].process.returncode == REFUSED else _last_message(refused[0]))


def _last_message(worker: _Worker) -> str:
    """It may be of several lines, the first of which begins with our name."""
    lines = worker.lines()
    starts = [i for i, line in enumerate(lines) if line.startswith("kilobatch: ")]
    return "\n".join(lines[starts[-1] :] if starts else lines[-1:])


def _epitaph(worker: _Worker, code: int) -> str:
    if code >= 0:
        how = f"exit code {code}"
    else:
        how = f"ended by {signal.Signals(-code).name}"
        how += " (by someone, or by the kernel for want of memory)" if -code == signal.SIGKILL else ""
    lines = worker.lines()[-LAST_LINES:]
    if not lines:
        said = "it wrote nothing"
    elif worker.rank == 0:
        said = "its last lines stand above"
    else:
        said = "its last lines:\n" + "\n".join(f"    {line}" for line in lines)
    return f"rank {worker.rank} failed first: {how}; log: {worker.log}; {said}"


class _Asked:
    """Counts SIGINT, SIGTERM and SIGHUP while it is open."""

    def __init__(self) -> None:
        self.times = 0

    def __enter__(self) -> "_Asked":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # else started by nohup, to outlive its terminal
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self.times:
            return  # a closed terminal sends two, by its shell and by the kernel, and means one
        self.times += 1
        if self.times == 1:
            tell("kilobatch: stopping: the workers save and leave; once more to kill them")
