"""Runs workers on this machine: starts them together, supervises them, ends them together."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from kilobatch.launch.processes import parent_death
from kilobatch.launch.processes.events import StopRequested
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.processes.import_path import import_variables
from kilobatch.launch.processes.output import tell
from kilobatch.launch.processes.supervisor import LocalEventLog, MemoryQuestion, Supervisor
from kilobatch.launch.processes.worker_processes import STORE_FILE, WorkerGroup, start_workers
from kilobatch.trainer.ranks.gpu_driver import has_gpu_driver

GATHER = 0.2  # seconds after a failure in which failures of other workers are collected; no network delays them


def run_workers(
    folder: Path,
    workers: int,
    module: str,
    arguments: list[str],
    stall_minutes: float | None = None,
    question: MemoryQuestion | None = None,
) -> RunOutcome:
    """Runs `python -m <module> <arguments>` in `workers` processes and waits for them all.

    They write `folder/logs/rank-K.log`; rank 0 writes to this terminal, too. After SIGINT, SIGTERM or SIGHUP to this
    process the workers get SIGTERM, save and exit; a second SIGINT or SIGTERM kills them. When one fails, or none sends
    a heartbeat for stall_minutes, all are ended; also where the question, if there is one, is answered by no. However
    this function or this process ends, no worker outlives it.
    """
    # The port is taken here, before the workers, which only connect: so no other process can take it.
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1024) as listening,
        store_file(alone=True) as environment,
        _StopSignals() as signals,
    ):
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
        group = WorkerGroup(0, workers, "127.0.0.1", listening.getsockname()[1], environment)
        with start_workers(folder, workers, group, [module, *arguments]) as started, serve_store(listening, group):
            return Supervisor(LocalEventLog(), 0, signals.request, stall_minutes, GATHER, question).run(started)


@contextmanager
def store_file(*, alone: bool) -> Iterator[dict[str, str]]:
    """Yields the variables with which the workers of a machine find the file that is their store, where they are alone
    in the run and without a GPU: so this process needs no torch. Else their store is served (serve_store)."""
    with TemporaryDirectory(prefix="kilobatch-store-") as folder:
        yield {STORE_FILE: f"{folder}/store" if alone and not has_gpu_driver() else ""}


@contextmanager
def serve_store(listening: socket.socket | None, group: WorkerGroup) -> Iterator[None]:
    """Serves the key-value store through which the workers form their process group, where there are several and they
    have no file for it, in a process of its own (trainer.ranks.store_server). This process listens on its port already,
    so no other can take it, and quicker workers wait.

    listening: None where another machine serves it.
    """
    if listening is None or group.world == 1 or group.environment[STORE_FILE]:
        yield
        return
    descriptor = listening.detach()
    # It inherits the blocked signals: SLURM sends them to all processes of a job, and the workers end first.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT})
    try:
        server = subprocess.Popen(
            parent_death.command("kilobatch.trainer.ranks.store_server", str(descriptor), str(group.port)),
            env=os.environ | import_variables(),
            stdin=subprocess.DEVNULL,
            pass_fds=[descriptor],
            start_new_session=True,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(descriptor)
    try:
        yield
    finally:
        server.kill()
        server.wait()


class _StopSignals:
    """Counts SIGINT, SIGTERM and SIGHUP while it is open."""

    def __init__(self) -> None:
        self._times, self._name = 0, ""

    def request(self) -> StopRequested | None:
        """The request that the signals so far make: the first asks to stop, the second to kill."""
        return StopRequested(min(self._times, 2), self._name) if self._times else None

    def __enter__(self) -> "_StopSignals":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if (
            signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
        ):  # not under nohup, whose process is to outlive its terminal
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self._times:
            return  # a closed terminal sends SIGHUP twice, through its shell and through the kernel
        self._times += 1
        self._name = signal.Signals(number).name
        if self._times == 1:
            tell("kilobatch: stopping: the workers save and leave; once more to kill them")
