"""Finds jobs whose submission SLURM has not answered. Loads no torch."""

from pathlib import Path

from kilobatch.launch.runs import job_history
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.runs.run_folder import written_status
from kilobatch.launch.schedulers.slurm import Slurm


def known_job(run: Path) -> JobFile | None:
    """A run's job.json. A job whose submission was not answered is looked for in SLURM's queue, and written down.

    Raises UserError where SLURM does not answer.
    """
    file = job_history.read_job_file(run)
    if file is None or file.cluster != "slurm" or file.job_id or file.original or written_status(run) != "queued":
        return file
    array = file.array_index is not None
    job = Slurm().job_in((run.parent if array else run) / "submitit", file.earlier)
    if job is None:
        return file
    file = file.model_copy(update={"job_id": f"{job}_{file.array_index}" if array else job})
    job_history.write_job_file(run, file)
    return file
