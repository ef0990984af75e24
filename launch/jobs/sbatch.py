"""Jobs as sbatch gets them, by submitit. Loads no torch."""

import io
import shlex
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from kilobatch.data.errors import Refusal
from kilobatch.launch.jobs.cluster import Cluster, lead_seconds
from kilobatch.launch.jobs.slurm_job import Job
from kilobatch.launch.schedulers.slurm import Slurm


class _Executor(SlurmExecutor):
    """What submitit.AutoExecutor takes for SLURM; taken directly, since that one is not made where there is no srun,
    and a dry run needs none."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def script(cluster: Cluster, name: str, logs: Path, code: Path, points: int, after: str | None = None) -> str:
    """The text that `queue` would hand to sbatch; nothing is written or asked."""
    executor = _executor(cluster, name, logs, code, after)
    if points > 1:  # as submitit does for an array
        executor.parameters["map_count"] = points
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def queue(
    cluster: Cluster, name: str, logs: Path, code: Path, runs: Sequence[Path], after: str | None = None
) -> list[str]:
    """Submits a job for a run, or an array of jobs for several; returns their ids, such as 123, or 123_0 and 123_1.

    logs: where submitit keeps the tasks' output and what it hands to them; code: the snapshot that the job is to run;
    after: as of chain. Raises Refusal with sbatch's own words where it takes no such job.
    """
    executor = _executor(cluster, name, logs, code, after)
    said = io.StringIO()
    try:
        with redirect_stderr(said):  # submitit prints there what it raises
            jobs = executor.map_array(Job.__call__, [Job(str(run.absolute())) for run in runs])
    except (FailedJobError, FailedSubmissionError) as error:
        lines = [line.removeprefix("sbatch: error: ").strip() for line in str(error).splitlines()]
        raise Refusal(f"sbatch refused the job: {'; '.join(filter(None, lines)) or 'it does not say why'}") from error
    return [job.job_id for job in jobs]


def chain(cluster: Cluster, name: str, code: Path, runs: Sequence[Path], after: str | None = None) -> list[str]:
    """Submits a job for each run, to begin when the one before has finished; returns their ids.

    after: the job that the first waits for. A job that ends otherwise takes those behind it out of the queue. Raises
    Refusal as queue; what it had queued by then is cancelled.
    """
    ids: list[str] = []
    for run in runs:
        try:
            ids += queue(cluster, f"{name}-{run.name}", run / "submitit", code, [run], ids[-1] if ids else after)
        except Refusal:
            Slurm().cancel(ids)
            raise
    return ids


def _executor(cluster: Cluster, name: str, logs: Path, code: Path, after: str | None = None) -> _Executor:
    executor = _Executor(logs, python=cluster.python)
    executor.update_parameters(**_parameters(cluster, name, code, after))
    return executor


def _parameters(cluster: Cluster, name: str, code: Path, after: str | None) -> dict[str, Any]:
    """One task on each node: it starts the node's workers itself."""
    # A requeued job keeps its id, and SLURM takes it for finished only when it ends without another requeue.
    waits = {} if after is None else {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
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
        # Since SLURM 22.05, srun takes no --cpus-per-task from sbatch: the task would be bound to one CPU.
        "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={cpus}"],
        "wckey": None,  # submitit's own, which clusters that check it refuse
        "additional_parameters": {"requeue": True} | cluster.extra | waits,
        "setup": [*cluster.setup, *environment(code)],
    }


def _memory(gigabytes: float) -> str:
    return f"{int(gigabytes)}G" if gigabytes == int(gigabytes) else f"{int(gigabytes * 1024)}M"


def environment(code: Path) -> list[str]:
    """Lines of shell that have Python take our packages from `code`, and not from the folder it is started in."""
    path = shlex.quote(str(code.absolute()))
    return [f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}", "export PYTHONSAFEPATH=1"]
