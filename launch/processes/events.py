"""The events that the agents of a run share, in one order on every node, and the outcome that follows from them."""

import math
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from kilobatch.launch.processes.exit_status import REFUSED, RunOutcome, describe_exit
from kilobatch.launch.processes.victims import LAST_LINES, describe_timeouts, error_lines, timeout_of, victim_of

STOPS = (-signal.SIGTERM, -signal.SIGINT, -signal.SIGUSR2)  # exit codes of a worker that had no handlers yet
TIMED_OUT, LOST_PEER = 3, 4  # severities of failures that another worker is the cause of


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
    """A worker, or (rank None) an agent, has ended with an error. code: exit code, or minus the signal's number;
    raised: when the error was raised, where that is known; posted: when the event was; both by the clock of its host
    (time.time()); memory: how it ended, in words, where that was for want of memory."""

    rank: int | None
    host: str
    code: int
    lines: list[str]
    raised: float | None = None
    memory: str = ""
    posted: float = field(default_factory=time.time, compare=False)
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
    is; state: what the kernel says of one that could not.
    """

    rank: int
    host: str
    pace: int
    answered: bool
    lines: list[str]
    state: str = ""


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


def stop_may_follow(events: Sequence[Event]) -> bool:
    """Whether workers have ended as by a request to stop that has not come: a scheduler signals all processes of a job,
    and the agent may be the last to run."""
    ended = any(isinstance(event, WorkerFailed) and event.code in STOPS for event in events)
    return ended and not any(isinstance(event, StopRequested) for event in events)


def run_outcome(events: Sequence[Event], clocks: Mapping[str, float] | None = None) -> RunOutcome:
    """The verdict on a run, once every node is done or lost. The first that applies:

    a worker that refused (the lowest rank's message, as all may have met the same error); a worker killed by a signal;
    an exit code that no other death explains; a lost node; a stall, if no worker failed by itself; a stop that was
    asked for; a collective that timed out; a worker that lost another one; finished. Of several of a kind the earliest
    counts: by the time of the error where all of them have one, else by the order of the events.

    clocks: seconds by which one clock is ahead of that of each host, by which times are compared; None: all show the
    same time.
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
    failures = _most_likely_first(failures, clocks or {})
    lost = next((event for event in events if isinstance(event, AgentLost)), None)
    if failures and _severity(failures[0]) < TIMED_OUT:
        return _failed(failures[0])
    if lost:
        return RunOutcome("lost", None, lost.host, lost.how)
    stalled = next((event for event in events if isinstance(event, Stalled)), None)
    if stalled:
        return _stalled(stalled, [worker for done in events if isinstance(done, NodeDone) for worker in done.hung])
    if by_request or any(isinstance(event, NodeDone) and event.stopped for event in events):
        return RunOutcome("interrupted", how=stop.by if stop else "the workers were asked to stop")
    if failures and _severity(failures[0]) == TIMED_OUT:
        return _timed_out([failed for failed in failures if _severity(failed) == TIMED_OUT])
    return _failed(failures[0]) if failures else RunOutcome("finished")


def _most_likely_first(failures: list[WorkerFailed], clocks: Mapping[str, float]) -> list[WorkerFailed]:
    """The failures in the order in which they count."""

    def key(failed: WorkerFailed) -> tuple[int, int, float]:
        severity = _severity(failed)
        alike = [other.raised for other in failures if _severity(other) == severity]
        raised = -math.inf
        if failed.raised is not None and None not in alike:
            raised = failed.raised + clocks.get(failed.host, 0.0)
        return severity, (failed.rank or 0) if failed.code == REFUSED else 0, raised

    return sorted(failures, key=key)


def _severity(failed: WorkerFailed) -> int:
    """0 to 4: the smaller, the more likely this is the first failure, which the others followed from."""
    if failed.code == REFUSED:
        return 0
    if failed.code < 0 and failed.code != -signal.SIGABRT:  # with which libraries end a worker that waited in vain
        return 1
    match victim_of(failed.lines):
        case "timed out":
            return TIMED_OUT
        case "lost a peer":
            return LOST_PEER
        case None:
            return 1 if failed.code < 0 else 2


def _failed(failed: WorkerFailed) -> RunOutcome:
    if failed.code == REFUSED:
        return RunOutcome("refused", failed.rank, failed.host, "refused", _last_message(failed.lines))
    how, lines = failed.memory or describe_exit(failed.code), failed.lines[-LAST_LINES:]
    return RunOutcome("failed", failed.rank, failed.host, how, lines, short_of_memory=bool(failed.memory))


def _timed_out(failures: list[WorkerFailed]) -> RunOutcome:
    """The outcome where all that is known is that workers waited in vain in a collective."""
    by_rank = {failed.rank: failed for failed in failures if failed.rank is not None}
    how, rank = describe_timeouts({rank: timeout_of(failed.lines) for rank, failed in by_rank.items()})
    named = failures[0] if rank is None else by_rank[rank]
    return RunOutcome("stalled", rank, named.host, how, error_lines(named.lines))


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
    if unresponsive:
        named = unresponsive[0]
        rank = named.rank if len(unresponsive) < len(hung) else None  # no rank waits for another one
        return RunOutcome("stalled", rank, named.host, f"{how}; {_states(unresponsive)}", named.lines)
    if len(behind) < len(hung):
        how = f"{how}; {_ranks(behind)}: the least far"
        return RunOutcome("stalled", behind[0].rank, behind[0].host, how, behind[0].lines)
    return RunOutcome("stalled", None, stalled.host, f"{how}; all ranks came as far", hung[0].lines)


def _states(unresponsive: list[HungWorker]) -> str:
    """What the kernel says of the workers that wrote no stacks."""
    states = list(dict.fromkeys(worker.state for worker in unresponsive))
    alike = ([worker for worker in unresponsive if worker.state == state] for state in states)
    return "; ".join(f"{_ranks(workers)}: {workers[0].state or 'ended'}, no stacks written" for workers in alike)


def _ranks(workers: list[HungWorker]) -> str:
    return f"rank{'s' * (len(workers) > 1)} {', '.join(str(worker.rank) for worker in workers)}"
