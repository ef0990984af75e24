"""Submits jobs to SLURM with submitit, or prints the script that sbatch would get. Loads no torch."""

import shlex
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit import Job as SubmittedJob
from submitit import SlurmExecutor, SlurmJob
from submitit.core.utils import DelayedSubmission, JobPaths

from kilobatch.data.errors import UserError
from kilobatch.launch.jobs.cluster import Cluster, lead_seconds
from kilobatch.launch.jobs.slurm_job import Job
from kilobatch.launch.schedulers.scheduler import NoAnswer
from kilobatch.launch.schedulers.slurm import Slurm


class _Executor(SlurmExecutor):
    """The class that submitit.AutoExecutor uses for SLURM. AutoExecutor itself cannot be created without srun, which a
    dry run does not need."""

    @classmethod
    def affinity(cls) -> int:
        return 1

    def _internal_process_submissions(self, delayed_submissions: list[DelayedSubmission]) -> list[SubmittedJob[Any]]:
        """As submitit's, for a job or an array. submitit hands the caller's whole environment on, waits for sbatch for
        ever, and takes a missing answer for a refusal."""
        self.folder.mkdir(parents=True, exist_ok=True)
        pickles = [self.folder / f"{uuid.uuid4().hex}.pkl" for _ in delayed_submissions]
        for delayed, pickle in zip(delayed_submissions, pickles, strict=True):
            delayed.set_timeout(self.parameters["time"], self.max_num_timeout)
            delayed.dump(pickle)
        if len(pickles) > 1:
            self.parameters["map_count"] = len(pickles)
        script = self.folder / f".submission_file_{uuid.uuid4().hex}.sh"
        script.write_text(self._make_submission_file_text(self._submitit_command_str, ""))
        number = Slurm().submit(script)
        JobPaths(self.folder, number).move_temporary_file(script, "submission_file", keep_as_symlink=True)
        ids = [number] if len(pickles) == 1 else [f"{number}_{k}" for k in range(len(pickles))]
        jobs = [SlurmJob(self.folder, job_id, list(range(self._num_tasks()))) for job_id in ids]
        for job, pickle in zip(jobs, pickles, strict=True):
            job.paths.move_temporary_file(pickle, "submitted_pickle")
        return [*jobs]


def script(cluster: Cluster, name: str, logs: Path, code: Path, points: int, after: str | None = None) -> str:
    """The text that `queue` would give to sbatch. Writes nothing, and asks SLURM nothing."""
    executor = _executor(cluster, name, logs, code, after)
    if points > 1:  # submitit does the same for an array
        executor.parameters["map_count"] = points
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit_array(
    cluster: Cluster, name: str, logs: Path, code: Path, runs: Sequence[Path], after: str | None = None
) -> list[str]:
    """Submits a job for a run, or an array of jobs for several. Returns their ids, such as 123, or 123_0 and 123_1.

    logs: the folder for the tasks' output and the files that submitit passes to them; code: the snapshot that the job
    runs; after: the job that it waits for. Raises UserError with sbatch's own message where sbatch rejects the job, and
    NoAnswer where it cannot be known whether the job is queued.
    """
    executor = _executor(cluster, name, logs, code, after)
    try:
        jobs = executor.map_array(Job.__call__, [Job(str(run.absolute())) for run in runs])
    except NoAnswer:
        raise
    except UserError as error:
        raise UserError(f"sbatch refused the job: {str(error).removeprefix('sbatch: ')}") from error
    return [job.job_id for job in jobs]


def chain(cluster: Cluster, name: str, code: Path, runs: Sequence[Path], after: str | None = None) -> Iterator[str]:
    """Submits a job for each run, which begins when the job before it has finished. Yields each id once it is known.

    after: the job that the first one waits for. Where a job fails or is cancelled, SLURM removes those that wait for it
    from the queue. Raises UserError as submit_array does, after the jobs that were already queued have been cancelled;
    NoAnswer leaves these, and the runs that follow are not submitted.
    """
    ids: list[str] = []
    for run in runs:
        try:
            ids += submit_array(cluster, f"{name}-{run.name}", run / "submitit", code, [run], ids[-1] if ids else after)
        except NoAnswer:
            raise
        except (UserError, OSError):
            Slurm().cancel(ids)
            raise
        yield ids[-1]


def _executor(cluster: Cluster, name: str, logs: Path, code: Path, after: str | None = None) -> _Executor:
    executor = _Executor(logs, python=cluster.python)
    executor.update_parameters(**_parameters(cluster, name, code, after))
    return executor


def _parameters(cluster: Cluster, name: str, code: Path, after: str | None) -> dict[str, Any]:
    """What submitit passes to sbatch. There is one task on each node, which starts the node's workers itself."""
    # A requeued job keeps its id, and SLURM counts it as finished only when it ends without another requeue.
    dependency = {} if after is None else {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    cpus = cluster.workers * cluster.cpus_per_worker
    gpus = f"{cluster.gpu_type}:{cluster.gpus_per_node}" if cluster.gpu_type else cluster.gpus_per_node
    return {
        "job_name": name,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "comment": cluster.comment,
        "nodes": cluster.nodes,
        "ntasks_per_node": 1,
        "cpus_per_task": cpus,
        "gpus_per_node": gpus or None,
        "mem": None if cluster.mem_gb is None else _memory(cluster.mem_gb),
        "time": cluster.minutes,
        "array_parallelism": cluster.array_parallelism,
        "signal_delay_s": lead_seconds("slurm", cluster),
        "stderr_to_stdout": True,
        # Since SLURM 22.05, srun does not take --cpus-per-task from sbatch: without it, a task is bound to one CPU.
        # The first node's task outlives the others where a part of the evaluation is asked again: whatever WaitTime is.
        "srun_args": ["--kill-on-bad-exit=1", "--wait=0", f"--cpus-per-task={cpus}"],
        "wckey": None,  # submitit sets one of its own, and clusters that check wckeys reject it
        "additional_parameters": {"requeue": True} | cluster.extra | dependency,
        "setup": [*cluster.setup, *environment(code)],
    }


def _memory(gigabytes: float) -> str:
    return f"{int(gigabytes)}G" if gigabytes == int(gigabytes) else f"{int(gigabytes * 1024)}M"


def environment(code: Path) -> list[str]:
    """Lines of shell with which Python imports kilobatch from `code`, not from the folder that it is started in."""
    path = shlex.quote(str(code.absolute()))
    return [f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}", "export PYTHONSAFEPATH=1"]
