"""`python -m kilobatch.launch.cli.kill_worker RUN RANK`: SIGKILL for that worker of a run, on this machine. For
drills. Loads no torch."""

import sys
from pathlib import Path

import psutil


def strike(run: Path, rank: int) -> bool:
    """Whether there was such a worker here, of our own."""
    for process in psutil.process_iter():
        try:
            if str(run.absolute()) in process.cmdline() and process.environ().get("RANK") == str(rank):
                process.kill()
                return True
        except psutil.Error:  # ended meanwhile, or someone else's
            continue
    return False


if __name__ == "__main__":
    run, rank = Path(sys.argv[1]), int(sys.argv[2])
    sys.exit(0 if strike(run, rank) else f"there is no rank {rank} of {run} here")
