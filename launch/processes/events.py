"""What the agents of a run tell each other, in one order that all of them see, and what it comes to."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from kilobatch.launch.processes.exit_status import REFUSED, Ending, in_words

LAST_LINES = 20
STOPS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR2)  # exit codes of a worker that did not listen yet
# What a worker writes that has lost another: it is not the first to have failed.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "Connection was likely closed",
    "remote process",
)


@dataclass(frozen=True)
class Came:
    """A node's agent has come to the meeting."""

    node: int
    host: str
    kind: Literal["came"] = "came"


@dataclass(frozen=True)
class Together:
    """All have. outward: node 0's address among machines, empty where there is only one."""

    outward: str
    kind: Literal["together"] = "together"


@dataclass(frozen=True)
class Stop:
    """The workers are to save and leave; level 2: to be killed. by: what asked, and where."""

    level: int
    by: str
    kind: Literal["stop"] = "stop"


@dataclass(frozen=True)
class Failed:
    """A worker, or (rank None) an agent, ended in its own way."""

    rank: int | None
    host: str
    code: int
    lines: list[str]
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class Left:
    """A worker was asked to stop while it did not listen yet, and has ended: the others would wait for it for good."""

    rank: int
    kind: Literal["left"] = "left"


@dataclass(frozen=True)
class Stalled:
    """No worker of a node gave a sign of life for so many minutes."""

    host: str
    minutes: float
    kind: Literal["stalled"] = "stalled"


@dataclass(frozen=True)
class Lost:
    """A node's agent is gone."""

    node: int
    host: str
    how: str
    kind: Literal["lost"] = "lost"


@dataclass(frozen=True)
class Reached:
    """How far a worker that hangs had come, and where it hangs. answered: it could still write its stacks."""

    rank: int
    host: str
    pace: int
    answered: bool
    lines: list[str]


@dataclass(frozen=True)
class Done:
    """The workers of a node are all gone. stopped: some of them because they were asked to."""

    node: int
    stopped: bool
    hung: list[Reached]
    kind: Literal["done"] = "done"


@dataclass(frozen=True)
class Over:
    """Node 0's last word."""

    ending: Ending
    kind: Literal["over"] = "over"


News = Came | Together | Stop | Failed | Left | Stalled | Lost | Done | Over
Trouble = Failed | Left | Stalled | Lost  # whatever ends all workers
_reader: TypeAdapter[News] = TypeAdapter(Annotated[News, Field(discriminator="kind")])


def to_line(news: News) -> bytes:
    return _reader.dump_json(news) + b"\n"


def from_line(line: bytes) -> News:
    return _reader.validate_json(line)


def ending(news: Sequence[News]) -> Ending:
    """What a run's news come to, once every node is done or lost.

    A refusal goes first (that of the lowest rank: all may have met it), then a death by a signal, then an exit that
    nobody else's death explains, then a lost node; the earliest of each.
    """
    stop = next((one for one in news if isinstance(one, Stop)), None)
    by_request = [one for one in news if isinstance(one, Left)]
    failures: list[Failed] = []
    for one in news:
        if isinstance(one, Failed) and not (stop and one.code in STOPS):
            failures.append(one)
        elif isinstance(one, Failed) and one.rank is not None:  # by the scheduler, before its agent knew
            by_request.append(Left(one.rank))
    failures.sort(key=lambda failed: (_blame(failed), (failed.rank or 0) if failed.code == REFUSED else 0))
    lost = next((one for one in news if isinstance(one, Lost)), None)
    if failures and _blame(failures[0]) < 3:
        return _failed(failures[0])
    if lost:
        return Ending("lost", None, lost.host, lost.how)
    stalled = next((one for one in news if isinstance(one, Stalled)), None)
    if stalled and not failures:
        return _stalled(stalled, [one for done in news if isinstance(done, Done) for one in done.hung])
    if by_request or any(isinstance(one, Done) and one.stopped for one in news):
        return Ending("interrupted", how=stop.by if stop else "the workers were asked to stop")
    return _failed(failures[0]) if failures else Ending("finished")


def _blame(failed: Failed) -> int:
    lost_peer = any(sign in line for line in failed.lines[-LAST_LINES:] for sign in LOST_PEER)
    if failed.code == REFUSED:
        return 0
    if failed.code < 0 and not (lost_peer and failed.code == -signal.SIGABRT):  # libraries abort for a lost peer, too
        return 1
    return 3 if lost_peer else 2


def _failed(failed: Failed) -> Ending:
    if failed.code == REFUSED:
        return Ending("refused", failed.rank, failed.host, "refused", _last_message(failed.lines))
    return Ending("failed", failed.rank, failed.host, in_words(failed.code), failed.lines[-LAST_LINES:])


def _last_message(lines: list[str]) -> list[str]:
    """It may be of several lines, the first of which begins with our name."""
    starts = [i for i, line in enumerate(lines) if line.startswith("kilobatch: ")]
    return lines[starts[-1] :] if starts else lines[-1:]


def _stalled(stalled: Stalled, hung: list[Reached]) -> Ending:
    """Names the workers for which the others wait: those that cannot even write their stacks, or else that came the
    least far. Where all are alike, nobody is named."""
    how = f"no sign of life for {stalled.minutes:g} minutes"
    if not hung:
        return Ending("stalled", None, stalled.host, how)
    hung = sorted(hung, key=lambda worker: worker.rank)
    deaf = [worker for worker in hung if not worker.answered]
    behind = [worker for worker in hung if worker.pace == min(worker.pace for worker in hung)]
    for named, why in ((deaf, "stopped, or stuck in the kernel: no stacks written"), (behind, "the least far")):
        if 0 < len(named) < len(hung):
            ranks = f"rank{'s' * (len(named) > 1)} {', '.join(str(worker.rank) for worker in named)}"
            return Ending("stalled", named[0].rank, named[0].host, f"{how}; {ranks}: {why}", named[0].lines)
    return Ending("stalled", None, stalled.host, f"{how}; all ranks came as far", hung[0].lines)
