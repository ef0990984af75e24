"""Heartbeats of a worker to its launcher, which takes a worker that sends none for long to hang."""

import contextlib
import os

VARIABLE = "KILOBATCH_HEARTBEAT_FD"
# Sent by every rank equally often (twice a step), so that the rank with the fewest is the one that hangs.
PACE = b"#"
# Removed from the environment, because in a child process the number would stand for another file.
_PIPE = os.environ.pop(VARIABLE, None)


def heartbeat(in_step: bool = False) -> None:
    """Sends a heartbeat; does nothing without a launcher. Takes a microsecond.

    To be called wherever work makes progress, at least a few times a minute. in_step: it is one of the two that every
    rank sends in each step.
    """
    if _PIPE is not None:
        # A full pipe holds heartbeats enough. A broken one means that the launcher has died: the kernel will then end
        # this process, too.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(int(_PIPE), PACE if in_step else b".")
