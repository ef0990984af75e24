"""The outcome of a run, the exit codes of workers, and their description in words."""

import os
import signal
import socket
from dataclasses import dataclass, field
from typing import Literal

INTERRUPTED = 75  # the exit code of a worker that was asked to stop, has saved, and left (sysexits' EX_TEMPFAIL)
REFUSED = 2  # the exit code of a worker that met a refusal and has printed it

OutcomeKind = Literal["finished", "interrupted", "refused", "failed", "stalled", "lost"]


@dataclass(frozen=True)
class RunOutcome:
    """The end of a run. kind: interrupted: it stopped on request; lost: the connection to a node's agent broke.

    rank, host: of the first worker to fail, where there is one; how: a description of one line; lines: the last that
    this worker wrote, or the whole message of a refusal. short_of_memory: that worker ended for want of memory;
    stepped: workers of this machine have begun a step.
    """

    kind: OutcomeKind
    rank: int | None = None
    host: str = ""
    how: str = ""
    lines: list[str] = field(default_factory=list)
    short_of_memory: bool = False
    stepped: bool = False


def describe_exit(code: int) -> str:
    """Describes in words how a process with this exit code (negative: a signal's number) ended."""
    if code >= 0:
        return f"exit code {code}"
    how = f"ended by {signal.Signals(-code).name}"
    return how + (" (by someone, or by the kernel for want of memory)" if -code == signal.SIGKILL else "")


def this_host() -> str:
    """This machine's name: the one that SLURM uses, where SLURM runs this process, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()
