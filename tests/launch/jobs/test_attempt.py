"""The end of an attempt, where the scheduler's answers are late, wrong or missing."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kilobatch.launch.jobs.attempt import _Attempt
from kilobatch.launch.jobs.node_workers import read_job
from kilobatch.launch.jobs.signals import Signals
from kilobatch.launch.nodes import agent
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.final_evaluation import REST, FinalEvaluation, PartResult
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers import slurm
from kilobatch.launch.schedulers.scheduler import Task
from tests.helpers.sample_checkpoints import save
from tests.launch.conftest import CommandResult

LOST = "sleep 0.1; echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1"
REFUSED = "echo 'Requested operation is presently disabled for job 5' >&2; exit 1"


@pytest.fixture
def signals() -> Iterator[Signals]:
    handled = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)}
    yield Signals()
    for number, handler in handled.items():
        signal.signal(number, handler)


@pytest.fixture
def attempt(tmp_path: Path, signals: Signals, monkeypatch: pytest.MonkeyPatch) -> _Attempt:
    """The first attempt of job 5, which has ended; SLURM's commands are to be written to the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "RETRY_PAUSE", 0.05)
    monkeypatch.setattr(slurm, "RETRY_FOR", 0.3)
    monkeypatch.setattr(slurm, "COMMAND_RETRY_FOR", 0.3)
    recipe = resolve_recipe("demo", ["run.name=mine"])
    run = run_folder.create_run(recipe.run, "demo", recipe.dump_yaml(), 2)
    run_folder.set_status(run, "running", 2)
    job = JobFile(cluster="slurm", job_id="5", nodes=2, submitted=job_history.utc_now(), code="code/001")
    job_history.write_job_file(run, job)
    number = job_history.record_start(run, "5", 0, ["n0"], 2)
    job_history.record_end(run, number, "crashed", requeued=True)
    return _Attempt(run, Task("5", 0, 0, 1, ["n0"]), slurm.Slurm(), signals, number=number)


def program(name: str, requeue: str, show: str) -> None:
    Path(name).write_text(f"#!/bin/bash\ncase $1 in requeue) {requeue};; *) {show};; esac\n")
    Path(name).chmod(0o755)


def test_a_requeue_that_worked_before_its_answer_was_lost(attempt: _Attempt):
    program("scontrol", f"touch requeued; {LOST}", "echo JobState=PENDING Restarts=$(ls requeued | wc -l)")
    outcome = attempt._requeue("runs", 2)
    assert outcome.requeued and outcome.code == 0
    assert job_history.read_attempts(attempt.folder)[-1].stopped is None
    assert run_folder.read_state(attempt.folder).status == "queued"


def test_a_requeue_that_was_refused_interrupts_the_run(attempt: _Attempt):
    program("scontrol", REFUSED, "echo JobState=RUNNING Restarts=0")
    outcome = attempt._requeue("runs", 2)
    assert not outcome.requeued and outcome.code == 1
    assert run_folder.read_state(attempt.folder).status == "interrupted"


def test_a_requeue_of_which_nothing_is_known_leaves_the_question_to_the_scheduler(attempt: _Attempt):
    program("scontrol", LOST, LOST)
    outcome = attempt._requeue("runs", 2)
    assert not outcome.requeued and outcome.code == 1
    stopped = job_history.read_attempts(attempt.folder)[-1].stopped
    assert stopped and stopped.startswith("it is not known whether the job is queued anew: scontrol requeue: Unable to")
    program("squeue", "exit 1", "echo '5|PENDING||1:00|BeginTime'")
    assert run_folder.status(attempt.folder) == "queued", "it has worked"
    program("squeue", "exit 1", "echo 'Invalid job id specified' >&2; exit 1")
    assert run_folder.status(attempt.folder) == "interrupted", "it has not"


def test_an_attempt_whose_book_is_damaged_meanwhile_ends_and_is_requeued(attempt: _Attempt):
    recipe, _ = read_job(attempt.folder)
    (attempt.folder / "attempts.jsonl").write_text("damaged\n")
    attempt._checked_at -= 60
    assert attempt._stop_requested() is None
    program("scontrol", "touch requeued", "echo JobState=RUNNING Restarts=0")
    assert attempt._finish(RunOutcome("failed", 1, "n0", "exit code 1"), recipe, 2).requeued
    assert Path("requeued").exists() and run_folder.read_state(attempt.folder).status == "queued"


def test_a_signal_is_on_record_before_the_scheduler_is_asked(attempt: _Attempt):
    """SLURM signals a job's workers too, so they may end before the agent looks at its own signal."""
    recipe, _ = read_job(attempt.folder)
    attempt.number = job_history.record_start(attempt.folder, "5", 0, ["n0"], 2)
    signal.raise_signal(signal.SIGTERM)
    program("scontrol", "exit 1", "cp */mine/attempts.jsonl then; echo JobState=CANCELLED Restarts=0")
    attempt._finish(RunOutcome("failed", 1, "n0", "ended by SIGTERM"), recipe, 2)
    assert '"event": "asked"' in Path("then").read_text().splitlines()[-1]
    assert job_history.read_attempts(attempt.folder)[-1].reason == "cancelled"


def test_what_is_left_of_an_evaluation_is_asked_on_the_first_node(attempt: _Attempt, monkeypatch: pytest.MonkeyPatch):
    """A worker of one of two nodes dies in an evaluator; the other node's agent has ended with the first start."""
    recipe, job = read_job(attempt.folder)
    save(attempt.folder / "checkpoints", 1, 6, meta={"step": 6, "steps_per_epoch": 3})
    starts: list[tuple[int, int, str, list[str]]] = []

    def run_node(run: Path, node: int, nodes: int, workers: int, meeting: str, arguments: list[str], **more: object):
        starts.append((nodes, workers, meeting, arguments[1:]))
        states = ["running", "due"] if len(starts) == 1 else ["failed", "finished"]
        parts = {name: PartResult.model_validate({"state": state}) for name, state in zip("ab", states, strict=True)}
        FinalEvaluation(step=6, parts=parts).write(run)
        return RunOutcome("failed", 5, "n1", "ended by SIGKILL") if len(starts) == 1 else RunOutcome("finished")

    monkeypatch.setattr(agent, "run_node", run_node)
    attempt.task = Task("5", 0, 0, 2, ["n0", "n1"])
    schedule = recipe.schedule.model_copy(update={"epochs": 2})
    job = job.model_copy(update={"workers_per_node": 4})
    recipe = recipe.model_copy(update={"schedule": schedule})
    outcome = attempt._train_and_evaluate(recipe, job)
    assert starts == [(2, 4, "5-0", []), (1, 4, "5-0-1", [REST])]
    assert (outcome.kind, attempt._evaluation, attempt._failures) == ("finished", "failed", "a: ")
    attempt.number += 1  # of the same job, which was requeued meanwhile: what it has evaluated is kept
    assert attempt._train_and_evaluate(recipe, job).kind == "finished"
    assert starts[2:] == [(2, 4, "5-0", [REST])]


def test_an_attempt_whose_job_was_not_known_writes_it_down(attempt: _Attempt, monkeypatch: pytest.MonkeyPatch):
    job = job_history.read_job_file(attempt.folder)
    assert job
    job_history.write_job_file(attempt.folder, job.model_copy(update={"job_id": ""}))
    program("squeue", "exit 1", "exit 1")
    program("scontrol", REFUSED, "echo JobState=RUNNING Restarts=0")
    run_folder.set_status(attempt.folder, "queued", 2)
    (attempt.folder / ".lock").mkdir()  # it cannot train
    assert attempt.run().code == 1
    written = job_history.read_job_file(attempt.folder)
    assert written and written.job_id == "5"


def test_a_job_that_could_not_be_cancelled_is_not_taken_for_cancelled(
    attempt: _Attempt, kilobatch: Callable[..., CommandResult]
):
    program("squeue", "exit 1", "echo '5|RUNNING|n0|1:00|None'")
    program("scancel", "exit 1", "echo 'scancel: error: Access/permission denied' >&2; exit 1")
    result = kilobatch("cancel", "mine")
    assert (result.code, result.err) == (2, "kilobatch: scancel: Access/permission denied\n")
    assert not (attempt.folder / "cancelled").exists()
    program("scancel", "exit 1", LOST)
    result = kilobatch("cancel", "mine")
    assert result.code == 2 and "Unable to contact" in result.err
    assert (attempt.folder / "cancelled").exists(), "it may have worked"
