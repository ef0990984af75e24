"""Starts the workers of one machine, reads their output and heartbeats, signals and ends them."""

import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from kilobatch.data.cpus import spare_threads
from kilobatch.launch.processes import failure_files, parent_death
from kilobatch.launch.processes.import_path import import_variables
from kilobatch.launch.processes.output import WorkerOutput, tell
from kilobatch.launch.processes.process_state import describe_process, thread_states
from kilobatch.trainer.ranks import heartbeat

# By default glibc returns large blocks to the kernel at once and gets them again, zeroed page by page: a third of a
# small network's step on a CPU. Activations have the same sizes in every step, so their blocks are kept.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}

STORE_FILE = "KILOBATCH_STORE"  # the variable with the path of a file as the store of the ranks; empty: it is served
KILL_SECONDS = 60.0  # after SIGKILL, for workers to end: the kernel may first have to free hundreds of GB


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of one machine. first: their lowest rank; world: the number of ranks of all machines; address, port:
    of the store through which all ranks connect; environment: further variables for these workers."""

    first: int
    world: int
    address: str
    port: int
    environment: dict[str, str]


class Worker:
    """A worker process. error_file: where it writes the error that ends it; heartbeats: received so far
    (trainer.ranks.heartbeat); pace: those that every rank sends equally often (twice a step), so that the rank with the
    fewest is the one that hangs."""

    def __init__(
        self, rank: int, process: subprocess.Popen[bytes], output: WorkerOutput, error_file: Path, heartbeat_pipe: int
    ) -> None:
        self.rank, self.process, self.output, self.error_file = rank, process, output, error_file
        self.heartbeats = self.pace = 0
        self._heartbeat_pipe = heartbeat_pipe

    def read_heartbeats(self) -> bool:
        """Counts the heartbeats that have come. False once there will be no more."""
        try:
            data = os.read(self._heartbeat_pipe, 1 << 16)
        except BlockingIOError:
            return True
        self.heartbeats += len(data)
        self.pace += data.count(heartbeat.PACE)
        return bool(data)

    def signal(self, number: signal.Signals) -> None:
        """Signals the worker and the processes that it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)


class KillDeadline:
    """The time until which all workers of a machine together are waited for, once they have been killed."""

    def __init__(self) -> None:
        self._until: float | None = None

    def after_kill(self) -> float:
        """That time, by time.monotonic(): KILL_SECONDS after the first call."""
        if self._until is None:
            self._until = time.monotonic() + KILL_SECONDS
        return self._until


class Workers:
    """The workers of a machine. all: also those that have ended; alive: those that run; deadline: for killed ones."""

    def __init__(self, all: list[Worker], selector: selectors.BaseSelector, deadline: "KillDeadline") -> None:
        self.all, self.alive = all, list(all)
        self.deadline, self._selector = deadline, selector

    def wait(self, seconds: float) -> list[Worker]:
        """Forwards output and counts heartbeats until some workers have ended, or for about so many seconds. Returns
        the workers that have ended, each as soon as it ends, so that the first to fail is known to be the first."""
        until = time.monotonic() + seconds
        while True:
            ended: list[Worker] = []
            for key, _ in self._selector.select(max(0.0, until - time.monotonic())):
                worker, source = key.data
                if source == "end":
                    self._selector.unregister(key.fileobj)
                    worker.process.wait()
                    worker.output.drain()
                    self.alive.remove(worker)
                    ended.append(worker)
                elif not (worker.output.forward() if source == "write" else worker.read_heartbeats()):
                    self._selector.unregister(key.fileobj)
            if ended or time.monotonic() >= until:
                return ended

    def signal(self, number: signal.Signals) -> None:
        for worker in self.alive:
            worker.signal(number)

    def end(self, grace: float) -> None:
        """Sends SIGTERM, and SIGKILL after `grace` seconds: once a worker has failed, others hang in a collective.

        Those that are stuck in the kernel stay alive: no signal ends them before the kernel lets go of them.
        """
        self.signal(signal.SIGTERM)
        until = time.monotonic() + grace
        while self.alive and time.monotonic() < until:
            self.wait(until - time.monotonic())
        self.signal(signal.SIGKILL)
        until = self.deadline.after_kill()
        while self.alive and time.monotonic() < until:
            self.wait(min(1.0, until - time.monotonic()))


@contextmanager
def start_workers(folder: Path, count: int, group: WorkerGroup, command: list[str]) -> Iterator[Workers]:
    """Runs `python -m <command>` in `count` processes, which are killed on exit from the context.

    Each gets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and its share of the CPUs as
    OMP_NUM_THREADS, and imports nothing from the folder that we were started in. Its output goes to
    `folder/logs/rank-K.log`, and rank 0's to our own output, too.
    """
    logs, deadline = folder / "logs", KillDeadline()
    logs.mkdir(exist_ok=True)
    failure_files.set_aside(logs, range(group.first, group.first + count))
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        workers: list[Worker] = []
        for local in range(count):
            rank = group.first + local
            output = WorkerOutput(logs / f"rank-{rank}.log", shown=rank == 0)
            stack.callback(output.close)
            ours, theirs = os.pipe()
            stack.callback(os.close, ours)
            for end in (ours, theirs):
                os.set_blocking(end, False)
            try:
                process = _start(_environment(group, local, count, logs, theirs), output, theirs, command)
            finally:
                os.close(theirs)
            stack.callback(_kill, rank, process, deadline)
            process_end = os.pidfd_open(process.pid)  # becomes readable when the process ends
            stack.callback(os.close, process_end)
            output.close_workers_end()
            worker = Worker(rank, process, output, failure_files.error_path(logs, rank), ours)
            workers.append(worker)
            selector.register(process_end, selectors.EVENT_READ, (worker, "end"))
            selector.register(output, selectors.EVENT_READ, (worker, "write"))
            selector.register(ours, selectors.EVENT_READ, (worker, "beat"))
        yield Workers(workers, selector, deadline)


def _environment(group: WorkerGroup, local: int, count: int, logs: Path, heartbeat_end: int) -> dict[str, str]:
    defaults = {"OMP_NUM_THREADS": str(spare_threads(count))} | KEEP_MEMORY
    defaults |= failure_files.flight_recorder_variables(logs, os.environ)
    ours = {
        "RANK": str(group.first + local),
        "WORLD_SIZE": str(group.world),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": group.address,
        "MASTER_PORT": str(group.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 connects to the store as well, instead of opening one
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONUTF8": "1",  # so that no locale refuses what a worker prints
        failure_files.ERROR_FILE: str(failure_files.error_path(logs.absolute(), group.first + local)),
        heartbeat.VARIABLE: str(heartbeat_end),
    }
    return defaults | os.environ | import_variables() | group.environment | ours


def _start(
    environment: dict[str, str], output: WorkerOutput, heartbeat_end: int, command: list[str]
) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        parent_death.command(*command),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output.workers_end,
        stderr=output.workers_end,
        pass_fds=[heartbeat_end],
        start_new_session=True,  # so Ctrl-C reaches only the launcher, which asks the workers to stop
    )


def _kill(rank: int, process: subprocess.Popen[bytes], deadline: KillDeadline) -> None:
    """Kills a worker that is alive, and waits for its end; tells where it does not end."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(max(0.0, deadline.after_kill() - time.monotonic()))
        except subprocess.TimeoutExpired:
            state = describe_process(thread_states(process.pid))
            tell(
                f"kilobatch: warning: rank {rank} (process {process.pid}) has been killed, but has not ended: {state}. "
                "It will end as soon as the kernel lets go of it, and will run no more until then"
            )
