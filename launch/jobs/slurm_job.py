"""What is submitted: pickled on the login node, called in one task on each node of the job. No torch at the top."""

import sys
from dataclasses import dataclass
from pathlib import Path

from kilobatch.launch.jobs.signals import Signals


@dataclass(frozen=True)
class Job:
    """run: the run's folder, absolute. All else is read from it when the job starts, also after a requeue."""

    run: str

    def __call__(self) -> None:
        signals = Signals()  # before anything slow
        from kilobatch.launch.jobs import attempt
        from kilobatch.launch.schedulers import slurm

        # Leaves by SystemExit, so that submitit keeps no result: a requeued job is to run again.
        sys.exit(attempt.run(Path(self.run), slurm.task(), slurm.Slurm(), signals).code)
