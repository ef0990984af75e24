"""A worker without torch, which starts at once: `python -m scripted_worker <what> FOLDER`. What it does depends on its
rank."""

import os
import signal
import sys
import time
import traceback
from pathlib import Path

from kilobatch.launch.processes.exit_status import INTERRUPTED, REFUSED
from kilobatch.launch.worker.error_file import recording_error
from kilobatch.trainer.ranks.heartbeat import heartbeat

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
failing = world // 2  # the first rank of the second of two nodes


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    received: list[int] = []
    if what != "starts":
        signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
    print(" ".join([*(os.environ[name] for name in names), *sys.argv[3:]]), flush=True)
    while len(list(folder.glob("pid-*"))) < world:
        time.sleep(0.02)
    match what:
        case "finishes":
            return
        case "fails" if rank == failing:
            time.sleep(0.3)
            print("\n".join(f"line {n}" for n in range(30)))
            print(f"RuntimeError: the disk of rank {rank} is on fire", flush=True)
            os._exit(1)
        case "fails" if world > 2:  # what gloo raises in the others, possibly before the first failure has been seen
            print("RuntimeError: [../gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4711", flush=True)
            os._exit(1)
        case "dies" if rank == failing:
            os.kill(os.getpid(), signal.SIGKILL)
        case "refuses" if rank == 1:
            print("kilobatch: no room on the disk", flush=True)
            os._exit(REFUSED)
        case "refuses":
            os._exit(1)
        case "hangs" if rank != 1:
            heartbeat(in_step=True)
            wait_for_others()
        case "hangs":
            hang()
        case "stops" | "forks" | "reads" if rank != 1:
            heartbeat(in_step=True)
            wait_for_others()
        case "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "forks":  # the new process waits for a writer before it runs, and the kernel has its parent wait for it
            os.mkfifo(folder / "fifo")
            opened = [(os.POSIX_SPAWN_OPEN, 0, folder / "fifo", os.O_RDONLY, 0)]
            os.posix_spawn("/bin/true", ["true"], os.environ, file_actions=opened)
        case "reads":
            (folder / "stuck" / "file").exists()
        case "raises":
            raise_and_exit(folder)
    while not received:
        time.sleep(0.02)
    if what == "saves":
        (folder / f"saved-{rank}").touch()
        sys.exit(INTERRUPTED)
    time.sleep(600)


def raise_and_exit(folder: Path) -> None:
    """Rank 1 raises first, but does not end by itself, as one that waits for a checkpoint."""
    try:
        with recording_error():
            if rank == 1:
                raise ValueError("the cause")
            while not (folder / "raised").exists():
                time.sleep(0.02)
            raise RuntimeError("a consequence")
    except Exception:
        if rank == 1:
            (folder / "raised").touch()
            time.sleep(600)
        traceback.print_exc()
        os._exit(1)


def wait_for_others() -> None:
    time.sleep(600)


def hang(depth: int = 30) -> None:
    if depth:
        hang(depth - 1)
    time.sleep(600)


if __name__ == "__main__":
    main()
