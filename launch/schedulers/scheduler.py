"""The interface to a scheduler of jobs, which SLURM and this machine implement. Loads no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from kilobatch.data.errors import UserError

State = Literal["queued", "running", "ending", "finished", "failed", "timed_out", "preempted", "cancelled", "gone"]
Fate = Literal["runs", "requeued", "ended"]


@dataclass(frozen=True)
class Task:
    """A process's place in its job, which has one process on each node. restart: how often the job was requeued."""

    job: str
    restart: int
    node: int
    nodes: int
    hosts: list[str]


@dataclass(frozen=True)
class JobState:
    """The scheduler's answer about a job.

    state: "gone": the scheduler does not know the job (any more); "ending": its processes are being ended, whatever
    follows. word: the scheduler's own word for the state. why: the reason why a job is queued. nodes: a list as SLURM
    writes it. seconds_left: until the time limit; None: there is none, or it is not known.
    """

    state: State
    word: str = ""
    why: str = ""
    nodes: str = ""
    seconds_left: float | None = None

    @property
    def open(self) -> bool:
        """Whether the job may still run, so that no other process may train in its folder."""
        return self.state in ("queued", "running", "ending")


class NoAnswer(UserError):
    """The scheduler did not answer. Whether a request that changes something has worked is then not known."""


class Scheduler(Protocol):
    """A scheduler. Ids of jobs are as it shows them: "123", or "123_4" for a job of an array.

    What changes a job raises UserError with the scheduler's message where it is refused. Where an answer is missing,
    the job's own state is asked before the request is repeated, and NoAnswer is raised where that cannot be known
    either.
    """

    def states(self, ids: Sequence[str]) -> dict[str, JobState]:
        """The state of each job, "gone" for unknown ones, by one call. Raises UserError where the scheduler does not
        answer."""
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """Ends jobs, queued or running; ignores those that have ended."""
        ...

    def signal(self, job: str, name: str) -> None:
        """Sends a signal, such as "USR2", to all processes of a running job."""
        ...

    def requeue(self, job: str, restart: int) -> None:
        """Ends a running job and queues it again. restart: how often it had been requeued when it began."""
        ...

    def fate(self, job: str, restart: int, signal: str | None) -> Fate:
        """Tells a job that got a signal whether it goes on running, was requeued, or is being ended for good.

        restart: how often it had been requeued when it began; signal: the one that it got. Raises UserError.
        """
        ...
