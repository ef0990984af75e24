"""How a run's workers ended, and the exit codes by which a worker says so itself."""

import os
import signal
import socket
from dataclasses import dataclass, field
from typing import Literal

INTERRUPTED = 75  # the exit code of a worker that was asked to stop, has saved, and left (sysexits' EX_TEMPFAIL)
REFUSED = 2  # the exit code of a worker that met a refusal and has printed it

Kind = Literal["finished", "interrupted", "refused", "failed", "stalled", "lost"]


@dataclass(frozen=True)
class Ending:
    """kind: interrupted: asked to stop, and did; lost: a node's agent went silent.

    rank, host: of the first to fail, where there is one; how: in a line of plain words; lines: the last it wrote, or
    the whole message of a refusal.
    """

    kind: Kind
    rank: int | None = None
    host: str = ""
    how: str = ""
    lines: list[str] = field(default_factory=list)


def in_words(code: int) -> str:
    """How a process with this exit code (negative: a signal's number) ended."""
    if code >= 0:
        return f"exit code {code}"
    how = f"ended by {signal.Signals(-code).name}"
    return how + (" (by someone, or by the kernel for want of memory)" if -code == signal.SIGKILL else "")


def this_host() -> str:
    """This machine's name as its users know it: SLURM's, where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
