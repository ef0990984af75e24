"""What is asked of whoever runs jobs: SLURM, or this machine. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

State = Literal["queued", "running", "ending", "finished", "failed", "timed_out", "preempted", "cancelled", "gone"]
Fate = Literal["runs", "requeued", "ended"]


@dataclass(frozen=True)
class Task:
    """A process's place in its job, which has one on each node. restart: how often the job was requeued."""

    job: str
    restart: int
    node: int
    nodes: int
    hosts: list[str]


@dataclass(frozen=True)
class JobState:
    """state: "gone" is a job that the scheduler does not know (any more); "ending" one whose processes are being ended,
    whatever comes then. word: the scheduler's own. why: for a job that waits. nodes: a list as SLURM writes it.
    seconds_left: until the time limit; None: none, or not known."""

    state: State
    word: str = ""
    why: str = ""
    nodes: str = ""
    seconds_left: float | None = None

    @property
    def open(self) -> bool:
        """Whether it may still run, so that nobody else should."""
        return self.state in ("queued", "running", "ending")


class Scheduler(Protocol):
    """Ids are as the scheduler shows them: "123", or "123_4" for one of an array."""

    def states(self, ids: Sequence[str]) -> dict[str, JobState]:
        """Of each id, "gone" included. One call for all; raises Refusal where the scheduler does not answer."""
        ...

    def cancel(self, ids: Sequence[str]) -> None:
        """Ends jobs, queued or running; those that are over already are let be. Raises Refusal."""
        ...

    def signal(self, job: str, name: str) -> None:
        """name: such as "USR2", to all processes of a running job. Raises Refusal."""
        ...

    def requeue(self, job: str) -> None:
        """Ends a running job and queues it anew. Raises Refusal with the scheduler's words."""
        ...

    def fate(self, job: str, restart: int, signal: str | None) -> Fate:
        """For a job that asks of itself: whether it runs on, was requeued, or is being ended for good.

        restart: how often it had been requeued when it began; signal: the one it was sent. Raises Refusal.
        """
        ...
