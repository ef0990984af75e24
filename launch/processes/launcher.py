"""Workers on this machine: started together, watched, ended together."""

import os
import signal
from pathlib import Path
from types import FrameType

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from kilobatch.launch.processes.events import Stop
from kilobatch.launch.processes.exit_status import Ending
from kilobatch.launch.processes.output import tell
from kilobatch.launch.processes.supervisor import Alone, Watch
from kilobatch.launch.processes.worker_processes import Place, started

GATHER = 0.2  # seconds for the failures of other workers to be seen: no network lies between


def run(folder: Path, workers: int, module: str, arguments: list[str], stall_minutes: float | None = None) -> Ending:
    """Runs `python -m <module> <arguments>` in `workers` processes and waits for them all.

    They write `folder/logs/rank-K.log`, rank 0 on this terminal, too. SIGINT, SIGTERM or SIGHUP here becomes SIGTERM
    there, and workers save and leave; a second SIGINT or SIGTERM kills them. When one fails, or none gives a sign of
    life for stall_minutes, all are ended. However this function or this process ends, no worker outlives it.
    """
    # The store lives here and has its port already: workers only connect, so that no other process can take the port.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    over_lo = {"GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    place = Place(0, workers, "127.0.0.1", store.port, over_lo)
    with _Asked() as asked, started(folder, workers, place, [module, *arguments]) as all_of_them:
        return Watch(Alone(), 0, asked.so_far, stall_minutes, GATHER).run(all_of_them)


class _Asked:
    """Counts SIGINT, SIGTERM and SIGHUP while it is open."""

    def __init__(self) -> None:
        self.times, self.by = 0, ""

    def so_far(self) -> Stop | None:
        return Stop(min(self.times, 2), self.by) if self.times else None

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
        self.by = signal.Signals(number).name
        if self.times == 1:
            tell("kilobatch: stopping: the workers save and leave; once more to kill them")
