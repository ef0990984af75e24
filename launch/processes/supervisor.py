"""Supervises the workers of one machine until they end, together with the supervisors of the run's other machines."""

import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from kilobatch.launch.processes.events import (
    LAST_LINES,
    STOPS,
    AgentJoined,
    AgentLost,
    AllJoined,
    Event,
    Failure,
    HungWorker,
    NodeDone,
    RunEnded,
    Stalled,
    StoppedEarly,
    StopRequested,
    WorkerFailed,
    run_outcome,
    stop_may_follow,
)
from kilobatch.launch.processes.exit_status import INTERRUPTED, REFUSED, RunOutcome, this_host
from kilobatch.launch.processes.failure_files import read_error
from kilobatch.launch.processes.held_memory import HeldMemory
from kilobatch.launch.processes.output import tell
from kilobatch.launch.processes.process_state import describe_process, describe_threads, thread_states
from kilobatch.launch.processes.stall_timer import StallTimer
from kilobatch.launch.processes.worker_processes import Worker, Workers

GRACE = 5.0  # seconds between SIGTERM and SIGKILL for the remaining workers after one has failed
DUMP = 2.0  # seconds for the workers that hang to write their stacks
STACK_HEAD = re.compile(r"(Current thread|Thread|Stack).*\(most recent call first\):$")  # of faulthandler
STOP_LAG = 3.0  # seconds in which a request to stop may follow the end of workers that the same signal has ended
OUTPUT_GRACE = 2.0  # seconds after which a log that could not be written ends the run
TICK = 0.2  # seconds between two looks at the events
STEP_DONE = 3  # heartbeats of a worker's pace: two of its first step, and one of the second


class EventLog(Protocol):
    """The events of a run, shared by its agents. When an agent is lost, an event that says so is appended."""

    def post(self, event: Event, /) -> None:
        """Appends an event."""
        ...

    def read(self) -> list[Event]:
        """The events since the last call, our own included, in the same order on every node."""
        ...


class MemoryQuestion(Protocol):
    """A question, asked while the workers start: can a step of theirs fit into this machine's memory?"""

    def cannot_fit(self) -> bool:
        """Whether the answer has come, and is no."""
        ...

    def refusal(self) -> str | None:
        """After such an answer, the message to the user; None: it is still being made."""
        ...


class LocalEventLog:
    """The events of a run on one machine."""

    def __init__(self) -> None:
        self._posted: list[Event] = []

    def post(self, event: Event) -> None:
        self._posted.append(event)

    def read(self) -> list[Event]:
        posted, self._posted = self._posted, []
        return posted


class Supervisor:
    """The supervisor of one node's workers.

    node: its number; stop_requested: the request to stop so far; stall_minutes: minutes without a heartbeat after which
    the workers are taken to hang; gather: seconds after a failure in which further failures are collected, since the
    event of the one that came first may arrive later; question: None: nothing is asked.
    """

    def __init__(
        self,
        event_log: EventLog,
        node: int,
        stop_requested: Callable[[], StopRequested | None],
        stall_minutes: float | None,
        gather: float,
        question: MemoryQuestion | None = None,
    ) -> None:
        self.event_log, self.node = event_log, node
        self.stop_requested, self.stall_minutes, self.gather = stop_requested, stall_minutes, gather
        self.events: list[Event] = []
        self._question, self._memory = question, HeldMemory()
        self._posted_level = 0  # level of the last stop that this node posted
        self._signalled_level = 0  # level of the last stop that was signalled to the workers
        self._stopped = self._output_failed = False
        self._kill_until: float | None = None  # time.monotonic(): when workers that were to be killed are given up
        self._heartbeats, self._stall_timer = 0, StallTimer()
        self._clocks: dict[str, float] = {}  # seconds by which this clock is ahead of a host's, as far as it is known

    def wait(self) -> None:
        """Waits a moment and exchanges events, before there are workers."""
        time.sleep(TICK)
        self._exchange_events(None)

    def joined_nodes(self) -> set[int]:
        """The nodes whose agents have joined, also those that are lost by now."""
        return {0} | {event.node for event in self.events if isinstance(event, AgentJoined)}

    def all_joined(self) -> AllJoined | None:
        """The event that all agents have joined; None before that, and where something ended the run first."""
        first = next(
            (event for event in self.events if isinstance(event, AllJoined | Failure | StopRequested | RunEnded)), None
        )
        return first if isinstance(first, AllJoined) else None

    def ended_before_start(self) -> bool:
        """Whether the run ended before its workers started: the same on every node, as all see the same order."""
        return self.all_joined() is None and any(
            isinstance(event, Failure | StopRequested | RunEnded) for event in self.events
        )

    def run(self, workers: Workers) -> RunOutcome:
        """Supervises the workers until the run ends. The outcome is the same on every node."""
        while workers.alive and not self._first_failure() and not self._kill_failed():
            self._poll(workers)
        until = time.monotonic() + self.gather
        while workers.alive and time.monotonic() < until:
            self._poll(workers)
        until = time.monotonic() + STOP_LAG
        while stop_may_follow(self.events) and time.monotonic() < until:
            self._poll(workers)
        hung: list[HungWorker] = []
        if isinstance(self._first_failure(), Stalled):
            hung = _dump_stacks(workers)
        remaining, ending_since = list(workers.alive), time.time()
        workers.end(grace=0.0 if hung else GRACE)
        for worker in remaining:
            if worker.process.returncode == REFUSED:  # for the same reason as the first
                self._handle_exit(worker)
            elif self._first_failure():
                self._report_earlier_error(worker, ending_since)
        outcome = self.conclude(self._stopped, hung)
        return replace(outcome, stepped=any(worker.pace for worker in workers.all))

    def conclude(self, stopped: bool, hung: list[HungWorker]) -> RunOutcome:
        """Posts that this node's workers have ended, and waits for the other nodes and for the outcome from node 0."""
        self.event_log.post(NodeDone(self.node, stopped, hung))
        posted_outcome = False
        while True:
            self._exchange_events(None)
            for event in self.events:
                if isinstance(event, RunEnded):
                    return event.outcome
            finished = {event.node for event in self.events if isinstance(event, NodeDone | AgentLost)}
            if self.node == 0 and finished >= self.joined_nodes() and not posted_outcome:
                self.event_log.post(RunEnded(run_outcome(self.events, self._clocks)))
                posted_outcome = True
            elif any(isinstance(event, AgentLost) and event.node == 0 for event in self.events):
                return run_outcome(self.events, self._clocks)
            else:
                time.sleep(TICK)

    def _first_failure(self) -> Failure | None:
        return next((event for event in self.events if isinstance(event, Failure)), None)

    def _kill_failed(self) -> bool:
        """Whether workers still live that were to be killed a while ago. No signal ends one that is stuck in the
        kernel."""
        return self._kill_until is not None and time.monotonic() > self._kill_until

    def _poll(self, workers: Workers) -> None:
        for worker in workers.wait(TICK):
            self._handle_exit(worker)
        self._memory.look([worker.process.pid for worker in workers.alive])
        self._refuse_what_cannot_fit(workers)
        for worker in workers.alive:
            self._check_output(worker)
        self._exchange_events(workers)
        heartbeats = sum(worker.heartbeats for worker in workers.all)
        if heartbeats > self._heartbeats:
            self._heartbeats = heartbeats
            self._stall_timer.reset()
        elif self.stall_minutes is not None and self._stall_timer.seconds() > 60 * self.stall_minutes:
            self._stall_timer.reset()
            self.event_log.post(Stalled(this_host(), self.stall_minutes))

    def _refuse_what_cannot_fit(self, workers: Workers) -> None:
        """Where a step cannot fit into memory, ends the workers before they fill it, then posts why. Workers that have
        done a step have shown that it fits."""
        question, self._question = self._question, None
        if question is None or any(worker.pace >= STEP_DONE for worker in workers.all):
            return
        if not question.cannot_fit():
            self._question = question
            return
        workers.end(GRACE)
        while (message := question.refusal()) is None:
            self.wait()
            if any(isinstance(event, StopRequested) for event in self.events):
                self._stopped = True
                return
        self.event_log.post(WorkerFailed(None, this_host(), REFUSED, message.splitlines()))
        self._exchange_events(None)

    def _exchange_events(self, workers: Workers | None) -> None:
        """Posts this node's request to stop, reads the new events, and signals a request among them to the workers."""
        if (stop := self.stop_requested()) and stop.level > self._posted_level:
            self._posted_level = stop.level
            self.event_log.post(stop)
        new = self.event_log.read()
        self.events += new
        for event in new:
            if isinstance(event, WorkerFailed):  # the quickest of a host's messages says most of its clock
                ahead = time.time() - event.posted
                self._clocks[event.host] = min(ahead, self._clocks.get(event.host, ahead))
            if isinstance(event, StopRequested) and workers and event.level > self._signalled_level:
                self._signalled_level = event.level
                workers.signal(signal.SIGTERM if event.level == 1 else signal.SIGKILL)
                if event.level > 1:
                    self._kill_until, self._stopped = workers.deadline.after_kill(), True

    def _check_output(self, worker: Worker) -> None:
        """Posts that a worker's log could not be written, as on a full disk, unless the worker leaves by itself for the
        same reason: its own message is better."""
        if worker.output.failure is not None and not self._output_failed:
            message, since = worker.output.failure
            if time.monotonic() - since > OUTPUT_GRACE:
                self._output_failed = True
                self.event_log.post(WorkerFailed(None, this_host(), REFUSED, [f"kilobatch: {message}"]))

    def _handle_exit(self, worker: Worker) -> None:
        """Posts the event that the end of a worker amounts to, if any."""
        code = worker.process.returncode
        if code == 0:
            if worker.output.failure is not None:
                tell(f"kilobatch: warning: {worker.output.failure[0]}")
            return
        killed = self._signalled_level > 1 and code == -signal.SIGKILL
        if code == INTERRUPTED:
            self._stopped = True
        elif killed or (self._signalled_level and code in STOPS):
            self._stopped = True
            self.event_log.post(StoppedEarly(worker.rank))
        else:
            error = read_error(worker.error_file)
            raised = error.extraInfo.time if error else None
            lines = list(worker.output.lines)
            memory = self._memory.describe_end(worker.process.pid, code, lines)
            self.event_log.post(WorkerFailed(worker.rank, this_host(), code, lines, raised, memory))

    def _report_earlier_error(self, worker: Worker, ending_since: float) -> None:
        """Posts the error of a worker that we have ended, if it had raised one before: it may be the first to have
        failed, and have waited for a checkpoint that it was writing, or for other ranks."""
        error, code = read_error(worker.error_file), worker.process.returncode
        if error is None or error.extraInfo.time >= ending_since:
            return
        lines = list(worker.output.lines)
        if code is None or code < 0:  # it has not come to print its error
            code, lines = error.extraInfo.exit_code, error.extraInfo.py_callstack.splitlines()
            if code == REFUSED:
                lines = f"kilobatch: {error.message.partition(': ')[2]}".splitlines()
        self.event_log.post(WorkerFailed(worker.rank, this_host(), code, lines, error.extraInfo.time))


def _dump_stacks(workers: Workers) -> list[HungWorker]:
    """Has every worker write its stacks, and collects them."""
    workers.signal(signal.SIGUSR1)
    until = time.monotonic() + DUMP
    while time.monotonic() < until:
        workers.wait(until - time.monotonic())
    return [_hung_worker(worker) for worker in workers.alive]


def _hung_worker(worker: Worker) -> HungWorker:
    """A worker that hangs, with the frames in which its main thread hangs: faulthandler dumps that thread last, and its
    latest frames first. Of one that does not answer, the kernel tells where its threads are; its log says so, too."""
    lines = list(worker.output.lines)
    heads = [i for i, line in enumerate(lines) if STACK_HEAD.match(line)]
    if heads:
        frames = lines[heads[-1] :][:LAST_LINES]
        return HungWorker(worker.rank, this_host(), worker.pace, True, frames)
    threads = thread_states(worker.process.pid)
    state, told = describe_process(threads), describe_threads(threads)
    worker.output.add([f"kilobatch: no stacks of rank {worker.rank}: {state}", *told])
    return HungWorker(worker.rank, this_host(), worker.pace, False, told[:LAST_LINES], state)
