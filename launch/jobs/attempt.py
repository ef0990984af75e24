"""One attempt of a job on one of its nodes: workers, the run's books, and whether it goes back to the queue."""

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from kilobatch.data.errors import Refusal
from kilobatch.launch.jobs.signals import Signals, Stop
from kilobatch.launch.pipelines import pipeline
from kilobatch.launch.pipelines import results as pipeline_table
from kilobatch.launch.processes.exit_status import Ending, this_host
from kilobatch.launch.processes.output import tell
from kilobatch.launch.recipes import recipe
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs import requeue
from kilobatch.launch.runs import run_folder as runs
from kilobatch.launch.runs.job_history import JobFile, Reason
from kilobatch.launch.schedulers.scheduler import Fate, Scheduler, Task

SLACK = 90.0  # seconds by which a scheduler's signal may come earlier than it was asked for
TAKEOVER = 300.0  # seconds for an attempt that SLURM took for dead to notice its successor and save
GLANCE = 10.0  # seconds between two looks for a successor
AT_THE_LIMIT = 5.0  # seconds before it in which an end is taken for the time limit's
LAST_LINES = 20


@dataclass(frozen=True)
class Outcome:
    """code: for this process to exit with. A requeued job's is 0: its end is no failure."""

    requeued: bool
    code: int


def run(folder: Path, here: Task, scheduler: Scheduler, signals: Signals) -> Outcome:
    """Runs this node's workers of the run in `folder` until all workers have ended, wherever they are.

    Node 0 also prepares the data, keeps attempts.jsonl and state.json, and queues the job anew where that is allowed.
    """
    if here.node == 0:
        try:
            return _Attempt(folder, here, scheduler, signals).run()
        except Refusal as refusal:
            tell(f"kilobatch: {refusal}")
            return Outcome(requeued=False, code=1)
    try:
        chosen, job = _read(folder)
        _work(folder, here, chosen, job, signals.asked, lambda: None)
    except Exception:
        # Node 0 notices, and says so in the run's books; a code other than 0 would have SLURM kill it before that.
        traceback.print_exc()
    return Outcome(requeued=False, code=0)


def _read(folder: Path) -> tuple[Recipe, JobFile]:
    job = ledger.job_file(folder)
    if job is None:
        raise Refusal(f"{folder / 'job.json'} is missing; submit the run with: kilobatch resume {folder}")
    return recipe.load(folder / "recipe.yaml")[0], job


def _workers(here: Task, job: JobFile) -> int:
    """On each node. This machine alone stands for all that were asked for."""
    return job.workers_per_node * job.nodes // here.nodes


def _work(
    folder: Path, here: Task, chosen: Recipe, job: JobFile, asked: Callable[[], str | None], prepare: Callable[[], None]
) -> Ending:
    from kilobatch.launch.nodes import agent

    return agent.run(
        folder,
        here.node,
        here.nodes,
        _workers(here, job),
        f"{here.job}-{here.restart}",
        [str(folder)],
        interface=job.interface,
        asked=asked,
        stall_minutes=chosen.run.stall_minutes,
        prepare=prepare,
    )


@dataclass
class _Attempt:
    """Node 0's. number: in attempts.jsonl; limit: when the time limit ends it, by time.monotonic()."""

    folder: Path
    here: Task
    scheduler: Scheduler
    signals: Signals
    number: int = 0
    limit: float | None = None
    lead: float = 0.0
    superseded: bool = False
    _noted: bool = False
    _glanced: float = field(default_factory=time.monotonic)

    def run(self) -> Outcome:
        folder, here = self.folder, self.here
        chosen, job = _read(folder)
        if (why := self._may_not_begin(chosen)) is not None:
            return why
        workers = _workers(here, job) * here.nodes
        self.number = ledger.began(folder, here.job, here.restart, here.hosts, workers)
        self.limit, self.lead = self._time_limit(), job.signal_lead_seconds
        try:
            with self._claimed():
                runs.set_status(folder, "running", workers)
                ending = _work(folder, here, chosen, job, self._asked, lambda: self._prepare(chosen))
        except Stop:
            ending = Ending("interrupted")
        except Refusal as refusal:
            ending = Ending("refused", None, this_host(), lines=[f"kilobatch: {refusal}"])
        except Exception as error:  # of the launcher itself: the books are to say so before it ends
            lines = traceback.format_exc().splitlines()[-LAST_LINES:]
            ending = Ending("failed", None, this_host(), f"the launcher failed: {error!r}", lines)
        if self.superseded:
            ledger.ended(folder, self.number, "node_failed", how="taken for dead; its successor goes on", requeued=True)
            return Outcome(requeued=False, code=0)
        return self._close(ending, chosen, workers)

    def _may_not_begin(self, chosen: Recipe) -> Outcome | None:
        """After a cancellation, and after a requeue by the scheduler itself, which knows of no bounds."""
        if (self.folder / "cancelled").exists():
            runs.set_status(self.folder, "cancelled", runs.state(self.folder).workers)
            return Outcome(requeued=False, code=0)
        if (early := pipeline.too_early(self.folder)) is not None:  # the stage before it did not end well
            runs.set_status(self.folder, "cancelled", runs.state(self.folder).workers)
            tell(f"kilobatch: not begun: {early}")
            return Outcome(requeued=False, code=1)
        before = self._attempts()
        if not before or before[-1].ended:
            return None
        before[-1] = ledger.lost(before[-1])
        if (why := requeue.stopped(before, chosen.run.requeue)) is None:
            return None
        last = before[-1]
        assert last.reason is not None, "ledger.lost gives one"
        ledger.ended(self.folder, last.attempt, last.reason, how=last.how, stopped=why)
        runs.set_status(self.folder, "failed", last.workers)
        tell(f"kilobatch: not begun anew: {why}")
        return Outcome(requeued=False, code=1)

    def _attempts(self) -> list[ledger.Attempt]:
        """This job's: a run that is submitted again has its bounds anew."""
        return [one for one in ledger.read(self.folder) if one.job == self.here.job]

    def _time_limit(self) -> float | None:
        try:
            left = self.scheduler.states([self.here.job])[self.here.job].seconds_left
        except Refusal:  # asked once more at the end
            return None
        return None if left is None else time.monotonic() + left

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Holds the run once an attempt that SLURM took for dead, as its node did not answer, has let go of it."""
        deadline = time.monotonic() + TAKEOVER
        while True:
            try:
                claim = runs.claimed(self.folder)
                claim.__enter__()
                break
            except Refusal:
                if time.monotonic() > deadline:
                    raise
            if self._asked():
                raise Stop
            time.sleep(1)
        try:
            yield
        finally:
            claim.__exit__(None, None, None)

    def _prepare(self, chosen: Recipe) -> None:
        from kilobatch.launch.recipes.data import prepare_data

        self.signals.unless_asked(lambda: prepare_data(chosen))

    def _asked(self) -> str | None:
        """The signal, noted at once, as little time may be left; and whether another attempt has taken over."""
        if self.signals.name and not self._noted:
            self._noted = True
            ledger.asked(self.folder, self.number, self.signals.name, self._by_the_clock())
        if time.monotonic() > self._glanced + GLANCE:
            self._glanced = time.monotonic()
            self.superseded = ledger.read(self.folder)[-1].attempt > self.number
        return "a newer attempt" if self.superseded else self.signals.name

    def _by_the_clock(self) -> Reason:
        """A signal this near to the time limit is the one that announces it."""
        at = self.signals.at if self.signals.name else time.monotonic()  # it may have come to another node alone
        near = self.limit is not None and self.limit - at <= self.lead + SLACK
        return "timed_out" if near else "preempted"

    def _close(self, ending: Ending, chosen: Recipe, workers: int) -> Outcome:
        """Writes the books, then requeues: the scheduler may kill this process at once."""
        if ending.kind == "finished":
            ledger.ended(self.folder, self.number, "finished")
            runs.set_status(self.folder, "finished", workers)
            pipeline_table.after(self.folder)
            return Outcome(requeued=False, code=0)
        fate = self._fate()
        reason = self._reason(ending, fate)
        attempts = self._attempts()
        now = attempts[-1].model_copy(update={"reason": reason, "step": ledger.step(self.folder)})
        why = requeue.stopped([*attempts[:-1], now], chosen.run.requeue)
        how = ending.how or (f"asked to stop by {self.signals.name}" if self.signals.name else None)
        ledger.ended(
            self.folder,
            self.number,
            reason,
            rank=ending.rank,
            host=ending.host or None,
            how=how,
            lines=ending.lines,
            requeued=why is None,
            stopped=why,
        )
        tell("\n".join([f"kilobatch: {reason}{f': {how}' if how else ''}", *ending.lines]))
        if why is None:
            return self._requeue(fate, workers)
        runs.set_status(self.folder, "cancelled" if reason == "cancelled" else "failed", workers)
        if fate == "requeued":  # by the scheduler, which knows of no bounds
            self.scheduler.cancel([self.here.job])
        tell(f"kilobatch: not queued anew: {why}")
        return Outcome(requeued=False, code=0 if reason == "cancelled" else 1)

    def _requeue(self, fate: Fate, workers: int) -> Outcome:
        runs.set_status(self.folder, "queued", workers)
        if fate != "requeued":
            try:
                self.scheduler.requeue(self.here.job)
            except Refusal as refusal:
                ledger.stays(self.folder, self.number, str(refusal))
                runs.set_status(self.folder, "interrupted", workers)
                tell(f"kilobatch: not queued anew: {refusal}; go on with: kilobatch resume {self.folder}")
                return Outcome(requeued=False, code=1)
        return Outcome(requeued=True, code=0)

    def _fate(self) -> Fate:
        try:
            return self.scheduler.fate(self.here.job, self.here.restart, self.signals.name)
        except Refusal as refusal:  # a scheduler that does not answer is asked for the requeue all the same
            tell(f"kilobatch: {refusal}")
            return "runs"

    def _reason(self, ending: Ending, fate: Fate) -> Reason:
        if ending.kind == "refused":
            return "refused"
        if (self.folder / "cancelled").exists():
            return "cancelled"
        if self.signals.name or ending.kind == "interrupted":
            left = self._time_limit()
            self.limit = self.limit if left is None else left
            if fate == "ended":
                at_the_limit = self.limit is not None and time.monotonic() >= self.limit - AT_THE_LIMIT
                return "timed_out" if at_the_limit else "cancelled"
        if ending.kind == "interrupted":
            return self._by_the_clock()
        return "node_failed" if ending.kind == "lost" else "crashed"
