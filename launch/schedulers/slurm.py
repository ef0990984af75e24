"""Queries and controls SLURM jobs through SLURM's own commands. No torch."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence

from kilobatch.data.errors import UserError
from kilobatch.launch.schedulers.scheduler import Fate, JobState, State, Task

ANSWER_TIMEOUT = 5.0  # seconds for an answer of squeue or sacct
RETRY_FOR = 120.0  # seconds in which a job repeats a request about itself: the controller may be restarting
RETRY_PAUSE = 10.0  # seconds between two such tries

_STATES: dict[str, State] = {
    **dict.fromkeys(("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"), "queued"),
    **dict.fromkeys(
        ("RUNNING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"), "running"
    ),
    **dict.fromkeys(("FAILED", "BOOT_FAIL", "NODE_FAIL", "OUT_OF_MEMORY"), "failed"),
    **dict.fromkeys(("TIMEOUT", "DEADLINE"), "timed_out"),
    **dict.fromkeys(("PREEMPTED", "REVOKED"), "preempted"),
    "COMPLETING": "ending",
    "COMPLETED": "finished",
    "CANCELLED": "cancelled",
}
_GONE = JobState("gone")


def task() -> Task:
    """The place of this process in its job, from the variables that SLURM and submitit export."""
    import submitit

    environment = submitit.JobEnvironment()
    node_list = os.environ["SLURM_JOB_NODELIST"]
    return Task(
        job=environment.job_id,
        restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
        node=environment.node,
        nodes=environment.num_nodes,
        hosts=_run("scontrol", "show", "hostnames", node_list).split(),
    )


class Slurm:
    """SLURM as a scheduler. All users share slurmctld, which answers: so there is one call for many jobs, and none in a
    tight loop."""

    def states(self, ids: Sequence[str]) -> dict[str, JobState]:
        """Asks squeue and, for the jobs that squeue does not list any more, sacct, where there is accounting."""
        wanted = sorted({job for job in ids if job})
        found = self._squeue(wanted) if wanted else {}
        if unlisted := [job for job in wanted if job not in found]:
            found |= self._sacct(unlisted)
        return {job: found.get(job, _GONE) for job in ids}

    def _squeue(self, ids: list[str]) -> dict[str, JobState]:
        command = ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%N|%L|%r", "-j", ",".join(ids)]
        try:
            lines = _run(*command, timeout=ANSWER_TIMEOUT).splitlines()
        except UserError as error:
            if "Invalid job id specified" in str(error):  # only for a single job: of several, squeue leaves it out
                return {}
            raise
        found = {}
        for line in lines:
            job, word, nodes, left, why = line.split("|", 4)
            state = _STATES.get(word, "ending")  # a state of a newer SLURM: the job may still run
            found[job] = JobState(state, word, why if state == "queued" else "", nodes, _seconds(left))
        return found

    def _sacct(self, ids: list[str]) -> dict[str, JobState]:
        """The states of jobs that have ended; nothing where there is no accounting or no answer. Many clusters have no
        accounting, and it tells no more than how an old job ended, so its absence is no error."""
        if shutil.which("sacct") is None:
            return {}
        command = ["sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(ids)]
        try:
            lines = _run(*command, timeout=ANSWER_TIMEOUT).splitlines()
        except UserError:
            return {}
        words = dict(line.split("|", 1) for line in lines)
        # A state may have more words: "CANCELLED by 1000". A job that only sacct calls running or pending has ended
        # without its end being recorded, so it is left out.
        known = {job: JobState(_STATES.get(word.split()[0], "gone"), word) for job, word in words.items()}
        return {job: state for job, state in known.items() if not state.open}

    def cancel(self, ids: Sequence[str]) -> None:
        if ids:
            _run("scancel", *ids)

    def signal(self, job: str, name: str) -> None:
        _run("scancel", f"--signal={name}", job)

    def requeue(self, job: str) -> None:
        _run_with_retries("scontrol", "requeue", job)

    def fate(self, job: str, restart: int, signal: str | None) -> Fate:
        """Looks at the number of restarts first: a job in the state COMPLETING may be at any end, and only a requeue
        has raised that number."""
        description = _run_with_retries("scontrol", "-o", "show", "job", job)
        fields = dict(word.split("=", 1) for word in description.split() if "=" in word)
        if int(fields["Restarts"]) > restart:
            return "requeued"
        return "runs" if _STATES.get(fields["JobState"]) == "running" else "ended"


def _run(*command: str, timeout: float = 30.0) -> str:
    """The output of a command. Raises UserError where it fails (with its own message), is missing or does not
    answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError as error:
        raise UserError(f"there is no {command[0]} here: SLURM's commands are where its jobs are submitted") from error
    except subprocess.TimeoutExpired as error:
        raise UserError(f"SLURM does not answer: {command[0]} took more than {timeout:.0f} s; try again") from error
    if done.returncode:
        message = "; ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
        raise UserError(f"{' '.join(command[:2])}: {message or f'exit code {done.returncode}'}")
    return done.stdout


def _run_with_retries(*command: str) -> str:
    """Runs a command as _run does, and again while a controller that restarts does not answer: a job that could not
    reach it would not be requeued."""
    deadline = time.monotonic() + RETRY_FOR
    while True:
        try:
            return _run(*command)
        except UserError as error:
            if not _unreachable(str(error)) or time.monotonic() > deadline:
                raise
        time.sleep(RETRY_PAUSE)


def _unreachable(message: str) -> bool:
    """Whether the controller was not reached, or not in time; else it has refused the request."""
    return any(sign in message for sign in ("Unable to contact", "timed out", "does not answer", "temporarily"))


def _seconds(left: str) -> float | None:
    """The seconds in SLURM's [days-][hours:]minutes:seconds; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
