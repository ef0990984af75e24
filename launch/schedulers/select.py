"""Selects the scheduler that a run was submitted to. Loads no torch."""

from typing import Literal

from kilobatch.launch.schedulers.scheduler import Scheduler


def scheduler_of(cluster: Literal["slurm", "local"]) -> Scheduler:
    from kilobatch.launch.schedulers import slurm
    from kilobatch.launch.schedulers.local import Local

    return slurm.Slurm() if cluster == "slurm" else Local()
