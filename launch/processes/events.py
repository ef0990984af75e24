"""The events that the agents of a run share, in one order on every node, and the outcome that follows from them."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from kilobatch.launch.processes.exit_status import REFUSED, RunOutcome, describe_exit

LAST_LINES = 20
STOPS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR2)  # exit codes of a worker that had no handlers yet
# Parts of the last lines of a worker that lost the connection to another one, which had failed before.
LOST_PEER = (
    "Connection closed by peer",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "Connection was likely closed",
    "remote process",
)


@dataclass(frozen=True)
class AgentJoined:
    """A node's agent has connected to node 0."""

    node: int
    host: str
    kind: Literal["came"] = "came"


@dataclass(frozen=True)
class AllJoined:
    """The agents of all nodes have joined. address: of node 0, for other machines; "" where there is only one."""

    address: str
    kind: Literal["together"] = "together"


@dataclass(frozen=True)
class StopRequested:
    """A request to stop: at level 1 the workers save and exit, at level 2 they are killed. by: its origin, in words."""

    level: int
    by: str
    kind: Literal["stop"] = "stop"


@dataclass(frozen=True)
class WorkerFailed:
    """A worker, or (rank None) an agent, has ended with an error. code: exit code, or minus the signal's number."""

    rank: int | None
    host: str
    code: int
    lines: list[str]
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True)
class StoppedEarly:
    """A worker died of a request to stop: of the signal, before it had installed its handlers, or killed at level 2.

    The other ranks would wait for it for ever, so all workers are ended.
    """

    rank: int
    kind: Literal["left"] = "left"


@dataclass(frozen=True)
class Stalled:
    """No worker of a node has sent a heartbeat for so many minutes."""

    host: str
    minutes: float
    kind: Literal["stalled"] = "stalled"


@dataclass(frozen=True)
class AgentLost:
    """The connection to a node's agent is lost."""

    node: int
    host: str
    how: str
    kind: Literal["lost"] = "lost"


@dataclass(frozen=True)
class HungWorker:
    """A worker that was alive when its node stalled: it hangs, or waits for one that does.

    pace: how far it had come (see Worker); answered: it could still write its stacks; lines: of these stacks, where it
    is.
    """

    rank: int
    host: str
    pace: int
    answered: bool
    lines: list[str]


@dataclass(frozen=True)
class NodeDone:
    """All workers of a node have ended. stopped: some of them because they were asked to."""

    node: int
    stopped: bool
    hung: list[HungWorker]
    kind: Literal["done"] = "done"


@dataclass(frozen=True)
class RunEnded:
    """The outcome of the run, decided by node 0; its last event."""

    outcome: RunOutcome
    kind: Literal["over"] = "over"


Event = (
    AgentJoined | AllJoined | StopRequested | WorkerFailed | StoppedEarly | Stalled | AgentLost | NodeDone | RunEnded
)
Failure = WorkerFailed | StoppedEarly | Stalled | AgentLost  # the events after which all workers are ended
_reader: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="kind")])


def to_line(event: Event) -> bytes:
    return _reader.dump_json(event) + b"\n"


def from_line(line: bytes) -> Event:
    return _reader.validate_json(line)


def run_outcome(events: Sequence[Event]) -> RunOutcome:
    """The verdict on a run, once every node is done or lost. The first that applies:

    a worker that refused (the lowest rank's message, as all may have met the same error); a worker killed by a signal;
    an exit code that no other death explains; a lost node; a stall, if no worker failed; a stop that was asked for; a
    worker that died because another had; finished. Of several of a kind the earliest counts.
    """
    stop = next((event for event in events if isinstance(event, StopRequested)), None)
    by_request = [event for event in events if isinstance(event, StoppedEarly)]
    failures: list[WorkerFailed] = []
    for event in events:
        if isinstance(event, WorkerFailed) and not (stop and event.code in STOPS):
            failures.append(event)
        elif isinstance(event, WorkerFailed) and event.rank is not None:
            # The scheduler signalled this worker before the agent knew of the stop.
            by_request.append(StoppedEarly(event.rank))
    failures.sort(key=lambda failed: (_severity(failed), (failed.rank or 0) if failed.code == REFUSED else 0))
    lost = next((event for event in events if isinstance(event, AgentLost)), None)
    if failures and _severity(failures[0]) < 3:
        return _failed(failures[0])
    if lost:
        return RunOutcome("lost", None, lost.host, lost.how)
    stalled = next((event for event in events if isinstance(event, Stalled)), None)
    if stalled and not failures:
        return _stalled(stalled, [worker for done in events if isinstance(done, NodeDone) for worker in done.hung])
    if by_request or any(isinstance(event, NodeDone) and event.stopped for event in events):
        return RunOutcome("interrupted", how=stop.by if stop else "the workers were asked to stop")
    return _failed(failures[0]) if failures else RunOutcome("finished")


def _severity(failed: WorkerFailed) -> int:
    """0 to 3: the smaller, the more likely this is the first failure, which the others followed from."""
    lost_peer = any(sign in line for line in failed.lines[-LAST_LINES:] for sign in LOST_PEER)
    if failed.code == REFUSED:
        return 0
    if failed.code < 0 and not (lost_peer and failed.code == -signal.SIGABRT):  # libraries abort after a lost peer, too
        return 1
    return 3 if lost_peer else 2


def _failed(failed: WorkerFailed) -> RunOutcome:
    if failed.code == REFUSED:
        return RunOutcome("refused", failed.rank, failed.host, "refused", _last_message(failed.lines))
    return RunOutcome("failed", failed.rank, failed.host, describe_exit(failed.code), failed.lines[-LAST_LINES:])


def _last_message(lines: list[str]) -> list[str]:
    """The last message of a worker that refused: its first line begins with "kilobatch: ", others may follow."""
    starts = [i for i, line in enumerate(lines) if line.startswith("kilobatch: ")]
    return lines[starts[-1] :] if starts else lines[-1:]


def _stalled(stalled: Stalled, hung: list[HungWorker]) -> RunOutcome:
    """The outcome of a stall. Names the workers for which the others wait: those that could not write their stacks, or
    else those that came the least far; nobody where all are alike."""
    how = f"no sign of life for {stalled.minutes:g} minutes"
    if not hung:
        return RunOutcome("stalled", None, stalled.host, how)
    hung = sorted(hung, key=lambda worker: worker.rank)
    unresponsive = [worker for worker in hung if not worker.answered]
    behind = [worker for worker in hung if worker.pace == min(worker.pace for worker in hung)]
    for named, why in ((unresponsive, "stopped, or stuck in the kernel: no stacks written"), (behind, "the least far")):
        if 0 < len(named) < len(hung):
            ranks = f"rank{'s' * (len(named) > 1)} {', '.join(str(worker.rank) for worker in named)}"
            return RunOutcome("stalled", named[0].rank, named[0].host, f"{how}; {ranks}: {why}", named[0].lines)
    return RunOutcome("stalled", None, stalled.host, f"{how}; all ranks came as far", hung[0].lines)
