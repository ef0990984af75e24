"""Runs one attempt of a job on one of its nodes: starts the workers, records how they ended, and requeues the job where
that is allowed."""

import time
import traceback
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.launch.jobs.node_workers import meeting_name, own_failure, read_job, run_node_workers, workers_per_node
from kilobatch.launch.jobs.signals import Signals, StopSignal
from kilobatch.launch.pipelines.pipeline import reason_to_wait, resume_hint
from kilobatch.launch.pipelines.results import conclude_after_last_stage
from kilobatch.launch.planning.question import Question
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
        workers = workers_per_node(task, job)
        run_node_workers(folder, task, workers, recipe, job, signals.stop_requested, list, meeting_name(task))
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
            outcome = own_failure(error)
        if self.superseded:
            job_history.record_end(
                folder, self.number, "node_failed", how="taken for dead; its successor goes on", requeued=True
            )
            return AttemptOutcome(requeued=False, code=0)
        return self._finish(outcome, recipe, workers)

    def _train_and_evaluate(self, recipe: Recipe, job: JobFile) -> RunOutcome:
        starts, nodes, per_node = count(), self.task.nodes, workers_per_node(self.task, job)

        def start(more: list[str]) -> RunOutcome:
            question = Question(self.folder, recipe, per_node, nodes, other_nodes=True, anyway=job.anyway)
            prepare, number = partial(self._prepare, recipe, question), next(starts)
            task = replace(self.task, nodes=1) if number else self.task  # the other nodes' agents have ended
            parts = prepare, meeting_name(task, number), more, question
            with closing(question):
                ended = run_node_workers(self.folder, task, per_node, recipe, job, self._stop_requested, *parts)
                return question.explain(ended)

        epochs, evaluates = recipe.schedule.epochs, recipe.data.test is not None
        # Where an earlier attempt of this job has trained to the end, what it has evaluated is kept.
        again = evaluates and bool(self._earlier()) and final_evaluation.training_finished(self.folder, epochs)
        final = final_evaluation.run_to_the_end(self.folder, epochs, start, evaluates=evaluates, rest=again)
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
        tell(f"kilobatch: not begun anew: {why}{resume_hint(self.folder)}")
        return AttemptOutcome(requeued=False, code=1)

    def _attempts(self) -> list[job_history.Attempt]:
        """The attempts of this job. Those of the run's earlier jobs do not count: run.requeue is for each job anew."""
        return [attempt for attempt in job_history.read_attempts(self.folder) if attempt.job == self.task.job]

    def _earlier(self) -> list[job_history.Attempt]:
        """The attempts of this job before this one."""
        return [attempt for attempt in self._attempts() if attempt.attempt < self.number]

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
            except run_folder.Locked:
                if time.monotonic() > deadline:
                    raise
            if self._stop_requested():
                raise StopSignal
            time.sleep(1)
        try:
            yield
        finally:
            lock.__exit__(None, None, None)

    def _prepare(self, recipe: Recipe, question: Question) -> list[str]:
        """Prepares the data, and asks about them. Returns the arguments of a worker that names them; none where a
        signal has stopped it, as no worker starts then."""
        from kilobatch.launch.recipes.data import prepare_data

        data = self.signals.run_unless_stopped(lambda: prepare_data(recipe))
        if data is None:
            return []
        question.ask(data)
        return data.arguments()

    def _stop_requested(self) -> str | None:
        """Why the workers have to stop: the signal that came, or an attempt that has taken over; None: they need not.

        A signal is recorded in attempts.jsonl at once, since little time may be left.
        """
        if self.signals.name and not self._stop_recorded:
            self._stop_recorded = True
            job_history.record_stop_request(self.folder, self.number, self.signals.name, self._reason_of_signal())
        if time.monotonic() > self._checked_at + SUCCESSOR_CHECK_SECONDS:
            self._checked_at = time.monotonic()
            self.superseded = any(one.attempt > self.number for one in job_history.read_attempts(self.folder))
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
        self._stop_requested()  # recorded before the scheduler is asked: a slow answer may come after the end
        fate = self._fate()
        reason = self._reason(outcome, fate)
        own = {"attempt": self.number, "job": self.task.job, "restart": self.task.restart, "nodes": self.task.hosts}
        own |= {"workers": workers, "reason": reason, "step": job_history.last_step(self.folder)}
        current = job_history.Attempt(began="", from_step=0, **own)
        why = requeue.reason_to_stop([*self._earlier(), current], recipe.run.requeue)
        how = outcome.how or (f"asked to stop by {self.signals.name}" if self.signals.name else None)
        first_failure = {"rank": outcome.rank, "host": outcome.host or None, "how": how, "lines": outcome.lines}
        job_history.record_end(self.folder, self.number, reason, **first_failure, requeued=why is None, stopped=why)
        tell("\n".join([f"kilobatch: {reason}{f': {how}' if how else ''}", *outcome.lines]))
        if why is None:
            return self._requeue(fate, workers)
        run_folder.set_status(self.folder, "cancelled" if reason == "cancelled" else "failed", workers)
        if fate == "requeued":  # by the scheduler, which does not know run.requeue
            self.scheduler.cancel([self.task.job])
        tell(f"kilobatch: not queued anew: {why}{resume_hint(self.folder, outcome.lines)}")
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
                tell(f"kilobatch: not queued anew: {error}{resume_hint(self.folder)}")
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
