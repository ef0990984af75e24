"""Kills one worker of a run on this machine with SIGKILL, for drills. Loads no torch.

python -m kilobatch.launch.cli.kill_worker RUN RANK
"""

import sys
from pathlib import Path

import psutil


def kill_worker(run: Path, rank: int) -> bool:
    """Kills the worker. Returns False where this machine has none of that rank, or it belongs to another user."""
    for process in psutil.process_iter():
        try:
            if str(run.absolute()) in process.cmdline() and process.environ().get("RANK") == str(rank):
                process.kill()
                return True
        except psutil.Error:  # it has ended meanwhile, or belongs to another user
            continue
    return False


if __name__ == "__main__":
    run, rank = Path(sys.argv[1]), int(sys.argv[2])
    sys.exit(0 if kill_worker(run, rank) else f"there is no rank {rank} of {run} here")
