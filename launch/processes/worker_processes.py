"""The workers of one machine: started, listened to, signalled, ended."""

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kilobatch.data.cpus import spare_threads
from kilobatch.launch.processes.output import Output
from kilobatch.trainer.ranks import heartbeat as pulse

# glibc gives large blocks back to the kernel at once and takes them anew, zeroed page by page: a third of a small
# network's step on a CPU. Activations have the same sizes in every step, so they are kept.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}


@dataclass(frozen=True)
class Place:
    """A machine's share of the workers. first: its first rank; world: the ranks of all machines; address, port: of the
    store where they meet; environment: what else its workers get."""

    first: int
    world: int
    address: str
    port: int
    environment: dict[str, str]


class Worker:
    """beats: its signs of life so far (trainer.ranks.heartbeat); pace: those of them that the others give as often."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], output: Output, beats: int) -> None:
        self.rank, self.process, self.output = rank, process, output
        self.beats = self.pace = 0
        self._beats_from = beats  # a pipe

    def listen(self) -> bool:
        """Counts the signs of life that have come. False once there will be no more."""
        try:
            data = os.read(self._beats_from, 1 << 16)
        except BlockingIOError:
            return True
        self.beats += len(data)
        self.pace += data.count(pulse.PACE)
        return bool(data)

    def signal(self, number: signal.Signals) -> None:
        """To the worker and whatever it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


class Workers:
    """Some workers that run, or have."""

    def __init__(self, all: list[Worker], selector: selectors.BaseSelector) -> None:
        self.all, self.alive = all, list(all)
        self._selector = selector

    def wait(self, seconds: float) -> list[Worker]:
        """Passes on what is written and counts signs of life, until some workers have ended, which are returned, or
        for about so long. Whoever ends is seen at once, so that the first is seen first."""
        until = time.monotonic() + seconds
        while True:
            ended: list[Worker] = []
            for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
                worker, does = key.data
                if does == "end":
                    self._selector.unregister(key.fileobj)
                    worker.process.wait()
                    worker.output.drain()
                    self.alive.remove(worker)
                    ended.append(worker)
                elif not (worker.output.forward() if does == "write" else worker.listen()):
                    self._selector.unregister(key.fileobj)
            if ended or time.monotonic() >= until:
                return ended

    def signal(self, number: signal.Signals) -> None:
        for worker in self.alive:
            worker.signal(number)

    def end(self, grace: float) -> None:
        """SIGTERM, and after `grace` seconds SIGKILL: the workers hang in a collective, or soon will."""
        self.signal(signal.SIGTERM)
        until = time.monotonic() + grace
        while self.alive and time.monotonic() < until:
            self.wait(until - time.monotonic())
        self.signal(signal.SIGKILL)
        while self.alive:
            self.wait(1.0)


@contextmanager
def started(folder: Path, count: int, place: Place, command: list[str]) -> Iterator[Workers]:
    """Runs `python -m <command>` in `count` processes; none of them outlives this.

    Each gets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and its share of the CPUs as
    OMP_NUM_THREADS; what it writes goes to `folder/logs/rank-K.log`, and rank 0's to our own output, too.
    """
    (folder / "logs").mkdir(exist_ok=True)
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        workers: list[Worker] = []
        for local in range(count):
            rank = place.first + local
            output = Output(folder / "logs" / f"rank-{rank}.log", shown=rank == 0)
            stack.callback(output.close)
            ours, theirs = os.pipe()
            stack.callback(os.close, ours)
            for end in (ours, theirs):
                os.set_blocking(end, False)
            try:
                process = _start(_environment(place, local, count, theirs), output, theirs, command)
            finally:
                os.close(theirs)
            stack.callback(_kill, process)
            death = os.pidfd_open(process.pid)
            stack.callback(os.close, death)
            output.opened()
            worker = Worker(rank, process, output, ours)
            workers.append(worker)
            selector.register(death, selectors.EVENT_READ, (worker, "end"))
            selector.register(output, selectors.EVENT_READ, (worker, "write"))
            selector.register(ours, selectors.EVENT_READ, (worker, "beat"))
        yield Workers(workers, selector)


def _environment(place: Place, local: int, count: int, pulse_end: int) -> dict[str, str]:
    defaults = {"OMP_NUM_THREADS": str(spare_threads(count))} | KEEP_MEMORY
    ours = {
        "RANK": str(place.first + local),
        "WORLD_SIZE": str(place.world),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": place.address,
        "MASTER_PORT": str(place.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 connects to the store as well, instead of opening one
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONUNBUFFERED": "1",
        pulse.VARIABLE: str(pulse_end),
    }
    return defaults | os.environ | place.environment | ours


def _start(environment: dict[str, str], output: Output, pulse_end: int, command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "kilobatch.launch.processes.parent_death", str(os.getpid()), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output.workers_end,
        stderr=output.workers_end,
        pass_fds=[pulse_end],
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which asks the workers
    )


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
