"""A death of the workers once a training is saved leaves it finished; the other evaluators' results are kept."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.runs.final_evaluation import (
    REST,
    FinalEvaluation,
    FinalOutcome,
    PartResult,
    read_final_evaluation,
    run_to_the_end,
    training_finished,
)
from tests.helpers.sample_checkpoints import save

KILLED = RunOutcome("failed", 1, "n1", "ended by SIGSEGV")
STEPS = {"step": 6, "steps_per_epoch": 3}


def write(run: Path, **states: str) -> None:
    parts = {name: PartResult.model_validate({"state": state}) for name, state in states.items()}
    FinalEvaluation(step=6, parts=parts).write(run)


def evaluating(run: Path, *starts: tuple[dict[str, str], RunOutcome]) -> tuple[list[list[str]], Callable]:
    """The arguments of each start, and a function that starts workers: each leaves these states and ends like this."""
    calls: list[list[str]] = []

    def start(arguments: list[str]) -> RunOutcome:
        states, outcome = starts[len(calls)]
        calls.append(arguments)
        if states:
            write(run, **states)
        return outcome

    return calls, start


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    save(tmp_path / "checkpoints", 1, 6, meta=STEPS)
    return tmp_path


def test_a_training_has_finished_when_its_last_step_is_saved(trained: Path) -> None:
    assert [training_finished(trained, epochs) for epochs in (1, 2, 3)] == [True, True, False]
    (trained / "checkpoints" / "step-00000006" / "checkpoint.json").write_text("{")
    assert not training_finished(trained, 2)


def test_workers_that_end_in_one_part_leave_the_rest_to_others(trained: Path) -> None:
    first = {"knn": "finished", "picture": "running", "linear": "due"}, KILLED
    then = {"knn": "finished", "picture": "failed", "linear": "finished"}, RunOutcome("finished")
    calls, start = evaluating(trained, first, then)
    outcome = run_to_the_end(trained, 2, start, evaluates=True)
    assert (outcome.workers.kind, outcome.evaluation) == ("finished", "failed")
    assert calls == [[], [REST]]
    record = read_final_evaluation(trained)
    assert record and [part.state for part in record.parts.values()] == ["finished", "failed", "finished"]


def test_after_a_refusal_what_was_not_reached_has_failed_too(trained: Path) -> None:
    full = RunOutcome("refused", 1, "n1", "refused", ["kilobatch: no room left"])
    calls, start = evaluating(trained, ({"knn": "finished", "picture": "running", "linear": "due"}, full))
    outcome = run_to_the_end(trained, 2, start, evaluates=True)
    said = "picture: no room left; linear: not asked, since no room left"
    assert outcome == FinalOutcome(RunOutcome("finished"), "failed", said)
    calls, start = evaluating(trained, ({}, RunOutcome("finished")))
    run_to_the_end(trained, 2, start, evaluates=True, rest=True)
    assert calls == [[REST]]
    record = read_final_evaluation(trained)
    assert record and [part.state for part in record.parts.values()] == ["finished", "due", "due"]


@pytest.mark.parametrize(("evaluates", "evaluation"), [(True, "failed"), (False, None)])
def test_a_death_before_the_first_part_leaves_the_training_finished(
    trained: Path, evaluates: bool, evaluation: str | None
) -> None:
    _, start = evaluating(trained, ({}, KILLED))
    outcome = run_to_the_end(trained, 2, start, evaluates=evaluates)
    assert (outcome.workers.kind, outcome.evaluation) == ("finished", evaluation)


def test_a_training_that_is_not_saved_has_failed(trained: Path) -> None:
    _, start = evaluating(trained, ({}, KILLED))
    assert run_to_the_end(trained, 3, start, evaluates=True) == FinalOutcome(KILLED)
    for outcome in (RunOutcome("interrupted"), RunOutcome("refused", 0, lines=["kilobatch: other images"])):
        _, start = evaluating(trained, ({}, outcome))
        assert run_to_the_end(trained, 2, start, evaluates=True) == FinalOutcome(outcome)
