"""SLURM, by its own commands: what jobs do, and what is to be done with them. No torch."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence

from kilobatch.data.errors import Refusal
from kilobatch.launch.schedulers.scheduler import Fate, JobState, State, Task

ANSWER = 5.0  # seconds for squeue and sacct
PATIENCE = 120.0  # seconds in which a job asks again, of itself: the controller may be restarting
PAUSE = 10.0  # seconds between two such tries

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
    """This process's place in its job, as SLURM and submitit export it."""
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
    """Answers come from slurmctld, which all users share: one call for many jobs, and none in a tight loop."""

    def states(self, ids: Sequence[str]) -> dict[str, JobState]:
        """By squeue; of those that it has forgotten, by sacct where there is accounting."""
        wanted = sorted({one for one in ids if one})
        found = self._squeue(wanted) if wanted else {}
        if forgotten := [one for one in wanted if one not in found]:
            found |= self._sacct(forgotten)
        return {one: found.get(one, _GONE) for one in ids}

    def _squeue(self, ids: list[str]) -> dict[str, JobState]:
        command = ["squeue", "-h", "-r", "-t", "all", "-o", "%i|%T|%N|%L|%r", "-j", ",".join(ids)]
        try:
            lines = _run(*command, timeout=ANSWER).splitlines()
        except Refusal as refusal:
            if "Invalid job id specified" in str(refusal):  # of a single job; among several it is left out
                return {}
            raise
        found = {}
        for line in lines:
            job, word, nodes, left, why = line.split("|", 4)
            state = _STATES.get(word, "ending")  # a word that is newer than this: it may still run
            found[job] = JobState(state, word, why if state == "queued" else "", nodes, _seconds(left))
        return found

    def _sacct(self, ids: list[str]) -> dict[str, JobState]:
        """Nothing where there is no accounting or no answer: many clusters have none, and it says no more than how a
        job ended that nobody can do anything about."""
        if shutil.which("sacct") is None:
            return {}
        command = ["sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", ",".join(ids)]
        try:
            lines = _run(*command, timeout=ANSWER).splitlines()
        except Refusal:
            return {}
        words = dict(line.split("|", 1) for line in lines)
        # "CANCELLED by 1000"; a job that runs or waits by sacct alone is one whose end got lost
        known = {job: JobState(_STATES.get(word.split()[0], "gone"), word) for job, word in words.items()}
        return {job: state for job, state in known.items() if not state.open}

    def cancel(self, ids: Sequence[str]) -> None:
        if ids:
            _run("scancel", *ids)

    def signal(self, job: str, name: str) -> None:
        _run("scancel", f"--signal={name}", job)

    def requeue(self, job: str) -> None:
        _insist("scontrol", "requeue", job)

    def fate(self, job: str, restart: int, signal: str | None) -> Fate:
        """COMPLETING stands for any end; a requeue has counted its restart already, a cancellation has not."""
        shown = _insist("scontrol", "-o", "show", "job", job)
        fields = dict(word.split("=", 1) for word in shown.split() if "=" in word)
        if int(fields["Restarts"]) > restart:
            return "requeued"
        return "runs" if _STATES.get(fields["JobState"]) == "running" else "ended"


def _run(*command: str, timeout: float = 30.0) -> str:
    """What a command prints. Raises Refusal with its own words where it fails, is not here or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except FileNotFoundError as error:
        raise Refusal(f"there is no {command[0]} here: SLURM's commands are where its jobs are submitted") from error
    except subprocess.TimeoutExpired as error:
        raise Refusal(f"SLURM does not answer: {command[0]} took more than {timeout:.0f} s; try again") from error
    if done.returncode:
        said = "; ".join(line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip())
        raise Refusal(f"{' '.join(command[:2])}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def _insist(*command: str) -> str:
    """As _run, again and again while a controller that restarts does not answer: without it the job would be lost."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return _run(*command)
        except Refusal as refusal:
            if not _busy(str(refusal)) or time.monotonic() > deadline:
                raise
        time.sleep(PAUSE)


def _busy(words: str) -> bool:
    """Whether the controller was not reached, or not in time, rather than refused."""
    return any(sign in words for sign in ("Unable to contact", "timed out", "does not answer", "temporarily"))


def _seconds(left: str) -> float | None:
    """Of SLURM's [days-][hours:]minutes:seconds; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
