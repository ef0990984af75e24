"""A worker's signs of life, for whoever started it: without one for long, it is taken to hang."""

import contextlib
import os

VARIABLE = "KILOBATCH_PULSE_FD"
PACE = b"#"  # of those that every rank gives as often, so that one that hangs is behind
# Taken out of the environment: in a process that this one starts, the number would mean another file.
_PIPE = os.environ.pop(VARIABLE, None)


def beat(pace: bool = False) -> None:
    """To be called wherever work gets on, some times a minute at least; a microsecond. Nobody may be listening."""
    if _PIPE is not None:
        # Full: signs enough. Broken: the launcher has died, and the kernel is about to end this process, too.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(int(_PIPE), PACE if pace else b".")
