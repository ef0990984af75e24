"""Runs workers on this machine: starts them together, supervises them, ends them together."""

import os
import signal
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from kilobatch.launch.processes.events import StopRequested
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.processes.output import tell
from kilobatch.launch.processes.supervisor import LocalEventLog, Supervisor
from kilobatch.launch.processes.worker_processes import WorkerGroup, start_workers

GATHER = 0.2  # seconds after a failure in which failures of other workers are collected; no network delays them


def run_workers(
    folder: Path, workers: int, module: str, arguments: list[str], stall_minutes: float | None = None
) -> RunOutcome:
    """Runs `python -m <module> <arguments>` in `workers` processes and waits for them all.

    They write `folder/logs/rank-K.log`; rank 0 writes to this terminal, too. After SIGINT, SIGTERM or SIGHUP to this
    process the workers get SIGTERM, save and exit; a second SIGINT or SIGTERM kills them. When one fails, or none sends
    a heartbeat for stall_minutes, all are ended. However this function or this process ends, no worker outlives it.
    """
    # The store is opened here, before the workers, which only connect: so no other process can take its port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    loopback = {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    group = WorkerGroup(0, workers, "127.0.0.1", store.port, loopback)
    with _StopSignals() as signals, start_workers(folder, workers, group, [module, *arguments]) as started:
        return Supervisor(LocalEventLog(), 0, signals.request, stall_minutes, GATHER).run(started)


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
