"""A worker for the tests of jobs, which does what the file `errands` in its run's folder says, a line for each attempt.

`python -m scripted_job <run>`, run by launch.nodes.agent with this folder in PYTHONPATH. It trains nothing and loads no
torch; its checkpoints are empty folders.
"""

import os
import signal
import sys
import time
from pathlib import Path

from kilobatch.launch.processes.exit_status import INTERRUPTED, REFUSED
from kilobatch.launch.runs import job_history


def main() -> None:
    run, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: received.append(number))
    errands = (run / "errands").read_text().splitlines()
    attempt = job_history.read_attempts(run)[-1].attempt
    errand, _, word = errands[attempt - 1].partition(" ")
    (run / f"at-{attempt}-{rank}").touch()
    print(f"rank {rank}: {errand}", flush=True)
    match errand:
        case "waits":
            while not received:
                time.sleep(0.02)
            if rank == 0:
                (run / "checkpoints" / f"step-{job_history.checkpoint_step(run) + 1:08}").mkdir()
            sys.exit(INTERRUPTED)
        case "fails":
            if rank == 1:
                sys.exit(f"the disk is on fire: {word}")
            time.sleep(600)
        case "refuses":
            print(f"kilobatch: {word}", file=sys.stderr, flush=True)
            os._exit(REFUSED)
        case "finishes":
            return


if __name__ == "__main__":
    main()
