"""Runs a module that dies with its launcher:
`python -m kilobatch.launch.processes.parent_death <launcher's pid> <module> [arguments]`.

Has the kernel kill this process when its launcher dies (PR_SET_PDEATHSIG). Without that, workers of a killed launcher
would go on writing into a run folder that somebody else may resume. It is set before the module is imported, since that
takes seconds in which the launcher may die.

On SIGUSR1 the module's process writes the stacks of all its threads to stderr: a launcher asks this of a worker that
hangs. Python collects no garbage until the module asks for it (trainer.ranks.garbage).
"""

import ctypes
import faulthandler
import os
import runpy
import signal
import sys

from kilobatch.trainer.ranks.garbage import collect_later

_PR_SET_PDEATHSIG = 1


def command(module: str, *arguments: str) -> list[str]:
    """The command of a process that runs this module and dies with the one that starts it."""
    return [sys.executable, "-m", __name__, str(os.getpid()), module, *arguments]


def main() -> None:
    launcher, module = int(sys.argv[1]), sys.argv[2]
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != launcher:  # it died before the call above
        sys.exit("the launcher is gone")
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # also while the module waits in C
    sys.argv = sys.argv[2:]
    collect_later()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
