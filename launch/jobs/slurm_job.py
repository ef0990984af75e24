"""The function that is submitted to SLURM: submitit pickles it on the login node, and calls it in one task on each node
of the job. Loads no torch before it is called."""

import sys
from dataclasses import dataclass
from pathlib import Path

from kilobatch.launch.jobs.signals import Signals


@dataclass(frozen=True)
class Job:
    """One task of a job. run: the run's folder, an absolute path. Everything else is read from there when the task
    starts, also after a requeue."""

    run: str

    def __call__(self) -> None:
        signals = Signals()  # before the imports, which take seconds in which a signal may come
        from kilobatch.launch.jobs import attempt
        from kilobatch.launch.schedulers import slurm

        # SystemExit keeps submitit from storing a result, with which it would not run a requeued job again.
        sys.exit(attempt.run_attempt(Path(self.run), slurm.task(), slurm.Slurm(), signals).code)
