"""Runs one attempt of a job on one of its nodes: starts the workers, records how they ended, and requeues the job where
that is allowed."""

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.data.files import is_full_disk, refusal_of
from kilobatch.launch.jobs.node_workers import meeting_name, read_job, run_node_workers, workers_per_node
from kilobatch.launch.jobs.signals import Signals, StopSignal
from kilobatch.launch.pipelines.pipeline import reason_to_wait
from kilobatch.launch.pipelines.results import conclude_after_last_stage
from kilobatch.launch.processes.exit_status import RunOutcome, this_host
from kilobatch.launch.processes.output import tell
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.runs import final_evaluation, job_history, requeue, run_folder
from kilobatch.launch.runs.job_history import JobFile, Reason
from kilobatch.launch.schedulers.scheduler import Fate, NoAnswer, Scheduler, Task

SIGNAL_SLACK_SECONDS = 90.0  # by which a scheduler's signal may come earlier than it was asked for
TAKEOVER_SECONDS = 300.0  # for an attempt that SLURM took for dead to notice its successor and save
SUCCESSOR_CHECK_SECONDS = 10.0  # between two checks for a successor
TIME_LIMIT_SECONDS = 5.0  # before the time limit, from which on an end is counted as the limit's
LAST_LINES = 20


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended on this node. code: this process's exit code; 0 for a requeued job, which has not failed."""

    requeued: bool
    code: int


def run_attempt(folder: Path, task: Task, scheduler: Scheduler, signals: Signals) -> AttemptOutcome:
    """Runs this node's workers of the run in `folder` until the workers of all nodes have ended.

    Node 0 also prepares the data, writes attempts.jsonl and state.json, and requeues the job where that is allowed.
    """
    if task.node == 0:
        try:
            return _Attempt(folder, task, scheduler, signals).run()
        except UserError as error:
            tell(f"kilobatch: {error}")
            if (folder / "state.json").exists() and run_folder.read_state(folder).status == "running":
                run_folder.set_status(folder, "failed", run_folder.read_state(folder).workers)
            return AttemptOutcome(requeued=False, code=1)
    try:
        recipe, job = read_job(folder)
        run_node_workers(folder, task, recipe, job, signals.stop_requested, list, meeting_name(task))
    except Exception:
        # Node 0 notices that this agent is gone, and records it in attempts.jsonl. With an exit code other than 0 from
        # here, SLURM would kill node 0 before it could.
        traceback.print_exc()
    return AttemptOutcome(requeued=False, code=0)


@dataclass
class _Attempt:
    """An attempt as node 0 keeps it.

    number: in attempts.jsonl; limit: when the job's time limit is reached, by time.monotonic(), None: there is none or
    it is not known; lead: seconds before it at which the scheduler signals; superseded: a newer attempt has begun.
    """

    folder: Path
    task: Task
    scheduler: Scheduler
    signals: Signals
    number: int = 0
    limit: float | None = None
    lead: float = 0.0
    superseded: bool = False
    _stop_recorded: bool = False
    _evaluation: run_folder.EvaluationStatus | None = None
    _failures: str = ""  # of the evaluation
    _checked_at: float = field(default_factory=time.monotonic)

    def run(self) -> AttemptOutcome:
        folder, task = self.folder, self.task
        recipe, job = read_job(folder)
        if (not_begun := self._not_begun(recipe)) is not None:
            return not_begun
        if not job.job_id and job.original is None:  # sbatch's answer was lost, or is still being written
            job_history.write_job_file(folder, job.model_copy(update={"job_id": task.job}))
        workers = workers_per_node(task, job) * task.nodes
        self.number = job_history.record_start(folder, task.job, task.restart, task.hosts, workers)
        self.limit, self.lead = self._time_limit(), job.signal_lead_seconds
        try:
            with self._locked():
                run_folder.set_status(folder, "running", workers)
                outcome = self._train_and_evaluate(recipe, job)
        except StopSignal:
            outcome = RunOutcome("interrupted")
        except UserError as error:
            outcome = RunOutcome("refused", None, this_host(), lines=[f"kilobatch: {error}"])
        except Exception as error:  # of this process itself: attempts.jsonl has to say so before it ends
            outcome = _own_failure(error)
        if self.superseded:
            job_history.record_end(
                folder, self.number, "node_failed", how="taken for dead; its successor goes on", requeued=True
            )
            return AttemptOutcome(requeued=False, code=0)
        return self._finish(outcome, recipe, workers)

    def _train_and_evaluate(self, recipe: Recipe, job: JobFile) -> RunOutcome:
        starts = count()

        def start(more: list[str]) -> RunOutcome:
            prepare = partial(self._prepare, recipe)
            meeting = meeting_name(self.task, next(starts))
            return run_node_workers(self.folder, self.task, recipe, job, self._stop_requested, prepare, meeting, more)

        final = final_evaluation.run_to_the_end(
            self.folder,
            recipe.schedule.epochs,
            start,
            evaluates=recipe.data.test is not None,
            restarts=self.task.nodes == 1,  # the other nodes' agents have ended
        )
        self._evaluation, self._failures = final.evaluation, final.failures
        return final.workers

    def _not_begun(self, recipe: Recipe) -> AttemptOutcome | None:
        """The outcome of an attempt that may not begin; None: it may.

        It may not where the run was cancelled, the stage of a pipeline before it has not finished, or the scheduler has
        requeued the job itself, more often than run.requeue allows.
        """
        if (self.folder / "cancelled").exists():
            run_folder.set_status(self.folder, "cancelled", run_folder.read_state(self.folder).workers)
            return AttemptOutcome(requeued=False, code=0)
        if (reason := reason_to_wait(self.folder)) is not None:  # the stage before it has failed or was cancelled
            run_folder.set_status(self.folder, "cancelled", run_folder.read_state(self.folder).workers)
            tell(f"kilobatch: not begun: {reason}")
            return AttemptOutcome(requeued=False, code=1)
        attempts = self._attempts()
        if not attempts or attempts[-1].ended:
            return None
        attempts[-1] = job_history.with_unreported_end(attempts[-1])
        if (why := requeue.reason_to_stop(attempts, recipe.run.requeue)) is None:
            return None
        last = attempts[-1]
        assert last.reason is not None, "job_history.with_unreported_end gives one"
        job_history.record_end(self.folder, last.attempt, last.reason, how=last.how, stopped=why)
        run_folder.set_status(self.folder, "failed", last.workers)
        tell(f"kilobatch: not begun anew: {why}")
        return AttemptOutcome(requeued=False, code=1)

    def _attempts(self) -> list[job_history.Attempt]:
        """The attempts of this job. Those of the run's earlier jobs do not count: run.requeue is for each job anew."""
        return [attempt for attempt in job_history.read_attempts(self.folder) if attempt.job == self.task.job]

    def _time_limit(self) -> float | None:
        try:
            left = self.scheduler.states([self.task.job])[self.task.job].seconds_left
        except UserError:  # the scheduler does not answer; it is asked again at the end of the attempt
            return None
        return None if left is None else time.monotonic() + left

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Locks the run folder. An earlier attempt may still hold it, which SLURM took for dead because its node did
        not answer: waits until that one has let go."""
        deadline = time.monotonic() + TAKEOVER_SECONDS
        while True:
            try:
                lock = run_folder.locked(self.folder)
                lock.__enter__()
                break
            except UserError:
                if time.monotonic() > deadline:
                    raise
            if self._stop_requested():
                raise StopSignal
            time.sleep(1)
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    def _prepare(self, recipe: Recipe) -> list[str]:
        """Prepares the data. Returns the arguments of a worker that names them; none where a signal has stopped it, as
        no worker starts then."""
        from kilobatch.launch.recipes.data import prepare_data

        data = self.signals.run_unless_stopped(lambda: prepare_data(recipe))
        return data.arguments() if data else []

    def _stop_requested(self) -> str | None:
        """Why the workers have to stop: the signal that came, or an attempt that has taken over; None: they need not.

        A signal is recorded in attempts.jsonl at once, since little time may be left.
        """
        if self.signals.name and not self._stop_recorded:
            self._stop_recorded = True
            job_history.record_stop_request(self.folder, self.number, self.signals.name, self._reason_of_signal())
        if time.monotonic() > self._checked_at + SUCCESSOR_CHECK_SECONDS:
            self._checked_at = time.monotonic()
            self.superseded = job_history.read_attempts(self.folder)[-1].attempt > self.number
        return "a newer attempt" if self.superseded else self.signals.name

    def _reason_of_signal(self) -> Reason:
        """timed_out if the signal came within SIGNAL_SLACK_SECONDS of when that of the time limit is due; else
        preempted."""
        # The signal may have come to another node only; then it came just now.
        at = self.signals.received_at if self.signals.name else time.monotonic()
        near = self.limit is not None and self.limit - at <= self.lead + SIGNAL_SLACK_SECONDS
        return "timed_out" if near else "preempted"

    def _finish(self, outcome: RunOutcome, recipe: Recipe, workers: int) -> AttemptOutcome:
        """Writes attempts.jsonl and state.json, and requeues last: the scheduler may then kill this process at once."""
        if outcome.kind == "finished":
            how = f"its evaluation failed: {self._failures}" if self._failures else None
            run_folder.set_status(self.folder, "finished", workers, self._evaluation)
            job_history.record_end(self.folder, self.number, "finished", how=how)
            if how:
                tell(f"kilobatch: trained, but {how}; ask again with: kilobatch eval {self.folder}")
            conclude_after_last_stage(self.folder)
            return AttemptOutcome(requeued=False, code=0)
        fate = self._fate()
        reason = self._reason(outcome, fate)
        attempts = self._attempts()
        current = attempts[-1].model_copy(update={"reason": reason, "step": job_history.last_step(self.folder)})
        why = requeue.reason_to_stop([*attempts[:-1], current], recipe.run.requeue)
        how = outcome.how or (f"asked to stop by {self.signals.name}" if self.signals.name else None)
        job_history.record_end(
            self.folder,
            self.number,
            reason,
            rank=outcome.rank,
            host=outcome.host or None,
            how=how,
            lines=outcome.lines,
            requeued=why is None,
            stopped=why,
        )
        tell("\n".join([f"kilobatch: {reason}{f': {how}' if how else ''}", *outcome.lines]))
        if why is None:
            return self._requeue(fate, workers)
        run_folder.set_status(self.folder, "cancelled" if reason == "cancelled" else "failed", workers)
        if fate == "requeued":  # by the scheduler, which does not know run.requeue
            self.scheduler.cancel([self.task.job])
        tell(f"kilobatch: not queued anew: {why}")
        return AttemptOutcome(requeued=False, code=0 if reason == "cancelled" else 1)

    def _requeue(self, fate: Fate, workers: int) -> AttemptOutcome:
        run_folder.set_status(self.folder, "queued", workers)
        if fate != "requeued":
            try:
                self.scheduler.requeue(self.task.job, self.task.restart)
            except NoAnswer as error:
                # It may have worked. state.json goes on saying "queued", so that readers ask the scheduler.
                why = f"it is not known whether the job is queued anew: {error}"
                job_history.record_not_requeued(self.folder, self.number, why)
                tell(f"kilobatch: {why}; kilobatch status {self.folder} asks again")
                return AttemptOutcome(requeued=False, code=1)
            except UserError as error:
                job_history.record_not_requeued(self.folder, self.number, str(error))
                run_folder.set_status(self.folder, "interrupted", workers)
                tell(f"kilobatch: not queued anew: {error}; go on with: kilobatch resume {self.folder}")
                return AttemptOutcome(requeued=False, code=1)
        return AttemptOutcome(requeued=True, code=0)

    def _fate(self) -> Fate:
        try:
            return self.scheduler.fate(self.task.job, self.task.restart, self.signals.name)
        except UserError as error:  # it does not answer; _requeue asks it again
            tell(f"kilobatch: {error}")
            return "runs"

    def _reason(self, outcome: RunOutcome, fate: Fate) -> Reason:
        if outcome.kind == "refused":
            return "refused"
        if (self.folder / "cancelled").exists():
            return "cancelled"
        if self.signals.name or outcome.kind == "interrupted":
            left = self._time_limit()
            self.limit = self.limit if left is None else left
            if fate == "ended":
                at_the_limit = self.limit is not None and time.monotonic() >= self.limit - TIME_LIMIT_SECONDS
                return "timed_out" if at_the_limit else "cancelled"
        if outcome.kind == "interrupted":
            return self._reason_of_signal()
        return "node_failed" if outcome.kind == "lost" else "crashed"


def _own_failure(error: Exception) -> RunOutcome:
    """The outcome where this process itself has failed: a refusal on a full disk, which a requeue would not mend."""
    if isinstance(error, OSError) and is_full_disk(error):
        return RunOutcome("refused", None, this_host(), lines=[f"kilobatch: {refusal_of(error)}"])
    lines = traceback.format_exc().splitlines()[-LAST_LINES:]
    return RunOutcome("failed", None, this_host(), f"the launcher failed: {error!r}", lines)
