"""Queries and controls SLURM jobs through SLURM's own commands. No torch."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.launch.schedulers.environment import job_environment
from kilobatch.launch.schedulers.scheduler import Fate, JobState, NoAnswer, State, Task

ANSWER_TIMEOUT = 5.0  # seconds for an answer of squeue or sacct
CHANGE_TIMEOUT = 30.0  # seconds for an answer of scontrol, scancel or sbatch
RETRY_FOR = 120.0  # seconds in which a job repeats a request about itself: the controller may be restarting
COMMAND_RETRY_FOR = 60.0  # seconds likewise for a person's command
RETRY_PAUSE = 10.0  # seconds between two such tries
# Parts of what SLURM's commands say where they have sent a request but got no answer, or could not send it.
_MISSING = (
    "Unable to contact",
    "timed out",
    "does not answer",
    "temporarily",
    "Zero Bytes were transmitted",
    "Unexpected message received",
    "Communication connection failure",
    "Message receive failure",
    "Connection reset",
    "Transport endpoint is not connected",
)

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
            if line.count("|") < 4:
                raise UserError(f"squeue answers '{line[:80]}', which is no line of {command[6]}; try again")
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
        words = dict(line.split("|", 1) for line in lines if line.partition("|")[2].strip())
        # A state may have more words: "CANCELLED by 1000". A job that only sacct calls running or pending has ended
        # without its end being recorded, so it is left out.
        known = {job: JobState(_STATES.get(word.split()[0], "gone"), word) for job, word in words.items()}
        return {job: state for job, state in known.items() if not state.open}

    def cancel(self, ids: Sequence[str]) -> None:
        def is_done(lost: bool) -> bool:
            return not any(state.state in ("queued", "running") for state in self.states(ids).values())

        if ids := [job for job in ids if job]:
            _change("scancel", *ids, is_done=is_done, retry_for=COMMAND_RETRY_FOR)

    def signal(self, job: str, name: str) -> None:
        """A signal whose answer is missing is sent again: jobs heed the first and ignore the second."""

        def is_done(lost: bool) -> bool:
            return lost and self.states([job])[job].state != "running"

        _change("scancel", f"--signal={name}", job, is_done=is_done, retry_for=COMMAND_RETRY_FOR)

    def requeue(self, job: str, restart: int) -> None:
        def is_done(lost: bool) -> bool:
            restarts, state = _restarts_and_state(_run("scontrol", "-o", "show", "job", job))
            return restarts > restart or state == "queued"

        _change("scontrol", "requeue", job, is_done=is_done, retry_for=RETRY_FOR)

    def submit(self, script: Path) -> str:
        """Gives a script to sbatch. Returns the id of the job, or of the array of jobs.

        script: an absolute path that no other job has: where sbatch's answer is missing or makes no sense, the job is
        looked for by it before it is sent again.
        """
        found: list[str] = []

        def is_done(lost: bool) -> bool:
            found.extend(self._ids_of_script(script))
            return bool(found)

        def answer(text: str) -> bool:
            found.extend(re.findall(r"Submitted batch job (\d+)", text)[:1])
            return bool(found)

        _change("sbatch", str(script), is_done=is_done, retry_for=COMMAND_RETRY_FOR, accept=answer, once=True)
        return found[0]

    def _ids_of_script(self, script: Path) -> list[str]:
        lines = _run("squeue", "-h", "-t", "all", "-u", str(os.getuid()), "-o", "%F|%o", timeout=ANSWER_TIMEOUT)
        return [
            job for job, _, command in (line.partition("|") for line in lines.splitlines()) if command == str(script)
        ]

    def job_in(self, folder: Path, earlier: Sequence[str]) -> str | None:
        """The queued or running job, or array of jobs, whose script lies in this folder; None where there is none.

        earlier: ids of jobs that are not meant, as one that is about to end. Raises UserError where SLURM does not
        answer.
        """
        lines = _run("squeue", "-h", "-u", str(os.getuid()), "-o", "%F|%o", timeout=ANSWER_TIMEOUT).splitlines()
        parted, others = [line.partition("|") for line in lines], {job.partition("_")[0] for job in earlier}
        found = (job for job, _, command in parted if Path(command).parent.resolve() == folder.resolve())
        return next((job for job in found if job not in others), None)

    def fate(self, job: str, restart: int, signal: str | None) -> Fate:
        """Looks at the number of restarts first: a job in the state COMPLETING may be at any end, and only a requeue
        has raised that number."""
        restarts, state = _restarts_and_state(_run_with_retries("scontrol", "-o", "show", "job", job))
        if restarts > restart:
            return "requeued"
        return "runs" if state == "running" else "ended"


def _restarts_and_state(description: str) -> tuple[int, State]:
    """How often a job was requeued, and its state, in a line of `scontrol -o show job`."""
    restarts, state = (re.search(rf"(?:^|\s){name}=(\w+)", description) for name in ("Restarts", "JobState"))
    if restarts is None or state is None or not restarts[1].isdecimal():
        raise UserError(
            f"scontrol show job answers '{description.strip()[:80]}', without Restarts and JobState; try again"
        )
    return int(restarts[1]), _STATES.get(state[1], "ending")


def _run(*command: str, timeout: float | None = None) -> str:
    """The output of a command. timeout: in seconds; None: CHANGE_TIMEOUT. Raises UserError where it fails (with its own
    message) or is missing, and NoAnswer where it does not answer."""
    timeout = CHANGE_TIMEOUT if timeout is None else timeout
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env=job_environment(),
        )
    except FileNotFoundError as error:
        raise UserError(f"there is no {command[0]} here: SLURM's commands are where its jobs are submitted") from error
    except subprocess.TimeoutExpired as error:
        raise NoAnswer(f"SLURM does not answer: {command[0]} took more than {timeout:.0f} s; try again") from error
    if done.returncode:
        lines = [
            line.removeprefix(f"{command[0]}: error: ").strip() for line in (done.stderr or done.stdout).splitlines()
        ]
        message = "; ".join(filter(None, lines))
        # A refusal gives its reason. A command that a signal has killed may have sent its request before: SLURM kills
        # all processes of a job.
        missing = not message or done.returncode < 0 or any(sign in message for sign in _MISSING)
        name = " ".join(command[:2]) if command[0] == "scontrol" else command[0]
        raise (NoAnswer if missing else UserError)(f"{name}: {message or f'exit code {done.returncode}'}")
    return done.stdout


def _change(
    *command: str,
    is_done: Callable[[bool], bool],
    retry_for: float,
    accept: Callable[[str], bool] = lambda text: True,
    once: bool = False,
) -> None:
    """Runs a command that changes something, and again while its answer is missing and the change is not to be seen.

    is_done: looks whether the change has been made; it is told whether an answer was missing before. accept: whether an
    answer makes sense; once: it is not sent again as long as it is not known whether the change has been made: a second
    job would be queued. A refusal counts only where the change is not to be seen: the request before, whose answer was
    missing, may have worked. Raises the refusal, or NoAnswer after `retry_for` seconds.
    """
    deadline, lost = time.monotonic() + retry_for, False
    while True:
        try:
            text = _run(*command)
            if accept(text):
                return
            raise NoAnswer(f"{command[0]} answers '{text.strip()[:80]}', which makes no sense; try again")
        except UserError as error:
            failure, lost = error, lost or isinstance(error, NoAnswer)
        done = _look(is_done, lost)
        if done is not True and lost and time.monotonic() < deadline:
            time.sleep(RETRY_PAUSE)
            done = _look(is_done, lost)  # a late request may have worked meanwhile
        while done is None and once and lost and time.monotonic() < deadline:
            time.sleep(RETRY_PAUSE)
            done = _look(is_done, lost)
        if done:
            return
        if not isinstance(failure, NoAnswer) and (done is False or not lost):
            raise failure
        if time.monotonic() > deadline or (once and done is None):
            raise failure if isinstance(failure, NoAnswer) else NoAnswer(str(failure))


def _look(is_done: Callable[[bool], bool], lost: bool) -> bool | None:
    """Whether the change has been made; None where SLURM does not tell."""
    try:
        return is_done(lost)
    except UserError:
        return None


def _run_with_retries(*command: str) -> str:
    """Runs a command as _run does, and again while a controller that restarts does not answer: a job that could not
    reach it would not be requeued."""
    deadline, pause = time.monotonic() + RETRY_FOR, RETRY_PAUSE / 10  # soon at first: the job may be about to be killed
    while True:
        try:
            return _run(*command)
        except NoAnswer:
            if time.monotonic() > deadline:
                raise
        time.sleep(pause)
        pause = min(2 * pause, RETRY_PAUSE)


def _seconds(left: str) -> float | None:
    """The seconds in SLURM's [days-][hours:]minutes:seconds; None for UNLIMITED and the like."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", left)
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
