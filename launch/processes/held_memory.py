"""The memory that a machine's workers hold, to say of one that has ended whether that was for want of memory."""

import re
import signal
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from kilobatch.data.files import describe_bytes
from kilobatch.launch.processes.victims import LAST_LINES
from kilobatch.trainer.costs import machine_memory

WINDOW = 30.0  # seconds: a worker of many GiB takes some to end after its kill was counted
SCARCE = 0.02  # of the memory that the workers held: with less than this share left, the machine's memory was used up
_ERROR = re.compile(r"(\[rank\d+\]: ?)*([\w.]*(Error|Exception)\b|terminate called)")
# In the last error of a worker that has asked for memory in vain: torch on a GPU and on a CPU; numpy, Python; C++.
_ON_GPU = "CUDA out of memory"
_OUT_OF_MEMORY = (_ON_GPU, "DefaultCPUAllocator: can't allocate memory", "MemoryError", "std::bad_alloc")
_HELD_ON_GPU = re.compile(r"this process has ([\d.]+ [GM]iB) memory in use")


@dataclass(frozen=True)
class _Look:
    """What was seen at a time. free: bytes of the machine; kills: of processes by the kernel, for want of memory."""

    at: float
    free: int
    kills: int


class HeldMemory:
    """What workers held at their most, and what their machine was short of, as far as it was looked at."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}  # bytes, by process
        self._looks = deque([_look()])  # those of the last WINDOW, and one before it

    def look(self, processes: Sequence[int]) -> None:
        """Notes what these processes hold, and what the machine has left."""
        for process in processes:
            if (held := machine_memory.held_by(process)) is not None:
                self._held[process] = max(held, self._held.get(process, 0))
        self._looks.append(_look())
        while self._looks[1].at < self._looks[-1].at - WINDOW:
            self._looks.popleft()

    def describe_end(self, process: int, code: int, lines: Sequence[str]) -> str:
        """How a worker ended, in words, where that was for want of memory; else "".

        code: as Popen has it; lines: the last that it wrote. A SIGKILL counts where the kernel has counted one for want
        of memory, or where the machine's memory was used up; it may else have come from anyone.
        """
        held = f"; it held {describe_bytes(self._held[process])}" if process in self._held else ""
        if code == -signal.SIGKILL:
            if machine_memory.kills_for_memory() > self._looks[0].kills:
                return f"killed by the kernel for want of memory{held}"
            free = min(look.free for look in self._looks)
            if free < SCARCE * sum(self._held.values()):
                return f"ended by SIGKILL, when {describe_bytes(free)} of memory were left here{held}"
            return ""
        lines = lines[-LAST_LINES:]
        error = next((line for line in reversed(lines) if _ERROR.match(line)), "")
        if not any(sign in error for sign in _OUT_OF_MEMORY):
            return ""
        if _ON_GPU in error:
            used = _HELD_ON_GPU.search(error)
            held = f"; it held {used[1]} of its GPU" if used else ""
        return f"out of memory{held}"


def _look() -> _Look:
    return _Look(time.monotonic(), machine_memory.free_of_machine(), machine_memory.kills_for_memory())
