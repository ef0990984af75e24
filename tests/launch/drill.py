"""A worker for the launcher's tests: joins its group, then does as it is told.

`python -m drill <what> [argument]`, run by launch.here with this folder in PYTHONPATH.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path


def main() -> None:
    what, argument = sys.argv[1], sys.argv[2]
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    if what == "stays":  # deaf to SIGTERM; needs no group, and so none of torch's seconds
        (Path(argument) / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
        time.sleep(600)

    import torch.distributed as dist

    from launch.world import world

    here = world("cpu")
    here.connect(timedelta(seconds=60))
    try:
        obey(what, Path(argument), here.rank, asked)
    finally:
        dist.destroy_process_group()


def obey(what: str, folder: Path, rank: int, asked: list[int]) -> None:
    import torch
    import torch.distributed as dist

    from launch.here import INTERRUPTED

    total = torch.ones(1)
    dist.all_reduce(total)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    print(f"rank {rank} of {int(total)}, {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    if what == "finishes":
        return
    while what == "waits":
        flag = torch.tensor(float(bool(asked)))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag:
            sys.exit(INTERRUPTED)
        time.sleep(0.05)
    if what == "fails" and rank == 1:
        print("\n".join(f"line {n}" for n in range(30)))
        raise RuntimeError("the disk of rank 1 is on fire")
    if what == "dies" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)  # deaf to SIGTERM, outside any collective


if __name__ == "__main__":
    main()
