"""A worker without torch, and so without its seconds: `python -m scripted_worker <what> FOLDER`. Acts by its rank."""

import os
import signal
import sys
import time
from pathlib import Path

from kilobatch.launch.processes.exit_status import INTERRUPTED, REFUSED
from kilobatch.trainer.ranks.heartbeat import beat

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
guilty = world // 2  # the first rank of the second of two nodes


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    asked: list[int] = []
    if what != "starts":
        signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    print(" ".join(os.environ[name] for name in names), flush=True)
    while len(list(folder.glob("pid-*"))) < world:
        time.sleep(0.02)
    match what:
        case "finishes":
            return
        case "fails" if rank == guilty:
            time.sleep(0.3)
            print("\n".join(f"line {n}" for n in range(30)))
            print(f"RuntimeError: the disk of rank {rank} is on fire", flush=True)
            os._exit(1)
        case "fails" if world > 2:  # as gloo tells the others, before the first to fail has been seen
            print("RuntimeError: [../gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4711", flush=True)
            os._exit(1)
        case "dies" if rank == guilty:
            os.kill(os.getpid(), signal.SIGKILL)
        case "refuses" if rank == 1:
            print("kilobatch: no room on the disk", flush=True)
            os._exit(REFUSED)
        case "refuses":
            os._exit(1)
        case "hangs" if rank != 1:
            beat(pace=True)
            waits_for_the_others()
        case "hangs":
            sleeps_for_good()
    while not asked:
        time.sleep(0.02)
    if what == "saves":
        (folder / f"saved-{rank}").touch()
        sys.exit(INTERRUPTED)
    time.sleep(600)


def waits_for_the_others() -> None:
    time.sleep(600)


def sleeps_for_good(deep: int = 30) -> None:
    if deep:
        sleeps_for_good(deep - 1)
    time.sleep(600)


if __name__ == "__main__":
    main()
