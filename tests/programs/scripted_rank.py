"""A worker for the launcher's tests: joins its group, then does as it is told.

`python -m scripted_rank <what> [argument]`, run by launch.processes.launcher with this folder in PYTHONPATH.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from kilobatch.trainer.ranks.heartbeat import beat


def main() -> None:
    what, argument = sys.argv[1], sys.argv[2]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    alone(what, Path(argument), int(os.environ["RANK"]), asked)

    import torch.distributed as dist

    from kilobatch.launch.worker.process_group import world

    here = world("cpu")
    here.connect(timedelta(seconds=60))
    try:
        obey(what, Path(argument), here.rank, asked)
    finally:
        dist.destroy_process_group()


def alone(what: str, folder: Path, rank: int, asked: list[int]) -> None:
    """What needs no group, and so none of torch's seconds."""
    if what == "starts" and rank == 0:  # as a worker that does not listen yet
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    if what in ("stays", "starts"):  # deaf to SIGTERM
        time.sleep(600)
    if what == "ends anyway":
        while not asked:
            time.sleep(0.02)
        sys.exit(0)
    if what == "gets on":
        for _ in range(8):
            time.sleep(0.5)
            beat()
        sys.exit(0)
    if what in ("refuses", "all refuse"):
        while rank == 1 and not (folder / "pid-0").exists():
            time.sleep(0.02)
        if rank == 1 or what == "all refuse":
            print("kilobatch: warning: little room\nkilobatch: no room on the disk:\n  of this machine", flush=True)
            os._exit(2)  # as a worker does; an orderly end would fall to the SIGTERM that follows another's refusal
        time.sleep(600)


def obey(what: str, folder: Path, rank: int, asked: list[int]) -> None:
    import torch
    import torch.distributed as dist

    from kilobatch.launch.processes.exit_status import INTERRUPTED

    total = torch.ones(1)
    dist.all_reduce(total)
    (folder / f"met-{rank}").touch()
    print(f"rank {rank} of {int(total)}, {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    if what == "finishes":
        return
    while what == "waits":
        flag = torch.tensor(float(bool(asked)))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag:
            sys.exit(INTERRUPTED)
        time.sleep(0.05)
    time.sleep(600)  # deaf to SIGTERM, outside any collective


if __name__ == "__main__":
    main()
