"""A worker for the launcher's tests, which joins its process group and then does what its first argument says.

`python -m scripted_rank <what> [argument]`, run by launch.processes.launcher with this folder in PYTHONPATH.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

from kilobatch.trainer.ranks.heartbeat import heartbeat


def main() -> None:
    what, argument = sys.argv[1], sys.argv[2]
    received: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    act_without_group(what, Path(argument), int(os.environ["RANK"]), received)

    import torch.distributed as dist

    from kilobatch.launch.worker import flight_recorder
    from kilobatch.launch.worker.process_group import world_from_environment

    world = world_from_environment("cpu")
    flight_recorder.dump_on_request(world.rank)
    world.connect(timedelta(seconds=60))
    try:
        act_in_group(what, Path(argument), world.rank, received)
    finally:
        dist.destroy_process_group()


def act_without_group(what: str, folder: Path, rank: int, received: list[int]) -> None:
    """Does what needs no process group, and so saves the seconds of importing torch."""
    if what == "starts" and rank == 0:  # as a worker that has no handlers yet
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    (folder / f"store-{rank}").write_text(os.environ["KILOBATCH_STORE"])
    if what in ("stays", "starts"):  # does not react to SIGTERM
        time.sleep(600)
    if what == "ends anyway":
        while not received:
            time.sleep(0.02)
        sys.exit(0)
    if what == "gets on":
        for _ in range(8):
            time.sleep(0.5)
            heartbeat()
        sys.exit(0)
    if what in ("refuses", "all refuse"):
        while rank == 1 and not (folder / "pid-0").exists():
            time.sleep(0.02)
        if rank == 1 or what == "all refuse":
            print("kilobatch: warning: little room\nkilobatch: no room on the disk:\n  of this machine", flush=True)
            os._exit(2)  # as a worker does; a slower end would meet the SIGTERM that follows another's refusal
        time.sleep(600)


def act_in_group(what: str, folder: Path, rank: int, received: list[int]) -> None:
    import torch
    import torch.distributed as dist

    from kilobatch.launch.processes.exit_status import INTERRUPTED

    total = torch.ones(1)
    dist.all_reduce(total)
    (folder / f"met-{rank}").touch()
    print(f"rank {rank} of {int(total)}, {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    if what == "finishes":
        return
    if what == "waits in vain" and rank == 0:
        dist.all_reduce(total)
    while what == "waits":
        flag = torch.tensor(float(bool(received)))
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        if flag:
            sys.exit(INTERRUPTED)
        time.sleep(0.05)
    time.sleep(600)  # does not react to SIGTERM, and is in no collective


if __name__ == "__main__":
    main()
