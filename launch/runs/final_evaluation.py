"""Keeps evaluation.json, the record of the evaluators that run once a training has finished. Loads no torch."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel

from kilobatch.data.errors import UserError
from kilobatch.data.files import read_model, refusing_os_errors, write_state
from kilobatch.launch.processes.exit_status import RunOutcome, describe_exit
from kilobatch.launch.runs.job_history import last_line
from kilobatch.launch.runs.run_folder import EvaluationStatus
from kilobatch.trainer.checkpoint.description import list_checkpoints, read_description

FILE = "evaluation.json"
FORMER = "evaluation-step-{}.json"  # the same, of an end before the run got more epochs
REST = "--rest"  # the worker's option: evaluate only what has no result yet
LAST_EPOCH, PROJECTOR = "last epoch", "projector"  # parts beside the recipe's evaluators


class PartResult(BaseModel):
    """The result of one part of the evaluation. logged: its values as metrics.jsonl has them; why: it failed."""

    state: Literal["due", "running", "finished", "failed"] = "due"
    logged: dict[str, float] = {}
    why: str = ""


class FinalEvaluation(BaseModel):
    """The content of evaluation.json. step: of the checkpoint that is evaluated; parts: in the order they run in."""

    step: int
    parts: dict[str, PartResult]

    def write(self, run: Path) -> None:
        write_state(run / FILE, json.dumps(self.model_dump(), indent=1).encode() + b"\n")

    def failures(self) -> str:
        """The parts that failed, each with its reason, in one line; "" for none."""
        return "; ".join(f"{name}: {part.why}" for name, part in self.parts.items() if part.state == "failed")


def read_final_evaluation(run: Path) -> FinalEvaluation | None:
    """The record of a run; None where no evaluation has begun, and where the file is damaged."""
    try:
        return read_model(run / FILE, FinalEvaluation, "")
    except (FileNotFoundError, UserError):
        return None


def training_finished(run: Path, epochs: int) -> bool:
    """Whether all steps of so many epochs are done and saved: the newest checkpoint is of the last step, or of a later
    one."""
    checkpoints = list_checkpoints(run / "checkpoints")
    try:
        content = read_description(checkpoints[max(checkpoints)])
        return content["step"] >= epochs * content["meta"]["steps_per_epoch"]
    except (OSError, ValueError, KeyError):
        return False


@dataclass(frozen=True)
class FinalOutcome:
    """How workers that trained and then evaluated have ended. evaluation: None: it was not reached, or there is none;
    failures: what failed in it, in one line."""

    workers: RunOutcome
    evaluation: EvaluationStatus | None = None
    failures: str = ""


def run_to_the_end(
    run: Path,
    epochs: int,
    start: Callable[[list[str]], RunOutcome],
    *,
    evaluates: bool,
    rest: bool = False,
) -> FinalOutcome:
    """Runs workers that train and then evaluate. What ends them once the training is saved does not make it a failed
    one: their outcome is "finished", and the evaluation has failed.

    epochs: of the recipe; start: runs the workers with these arguments more: those with REST only evaluate; evaluates:
    there are test images; rest: only what has no result yet, or has failed, is evaluated. Where the workers end in one
    part of the evaluation, others are started for the rest.
    """
    if rest:
        _make_failed_due(run)
    else:
        with refusing_os_errors(run / FILE):
            _remove_former(run, epochs)
    trained_before = training_finished(run, epochs)
    outcome = start([REST] if rest else [])
    while outcome.kind not in ("finished", "interrupted") and training_finished(run, epochs):
        record = read_final_evaluation(run)
        if record is None:
            if outcome.kind == "refused" and trained_before:
                break  # at the start: the way out stands in its message
            failures = f"not begun, since {_reason(outcome)}" if evaluates else ""
            return FinalOutcome(RunOutcome("finished"), "failed" if failures else None, failures)
        left = _note_end(record, _reason(outcome), restarts=outcome.kind != "refused")
        record.write(run)
        if not left:
            failures = record.failures()
            return FinalOutcome(RunOutcome("finished"), "failed" if failures else "finished", failures)
        outcome = start([REST])
    record = read_final_evaluation(run) if outcome.kind == "finished" else None
    failures = record.failures() if record else ""
    return FinalOutcome(outcome, None if record is None else "failed" if failures else "finished", failures)


def _remove_former(run: Path, epochs: int) -> None:
    """Removes the record of an evaluation that is done anew; that of an end before the run got more epochs is kept
    under the name of its step."""
    record = read_final_evaluation(run)
    if record is not None and not training_finished(run, epochs):
        (run / FILE).replace(run / FORMER.format(f"{record.step:08d}"))
    else:
        (run / FILE).unlink(missing_ok=True)


def _make_failed_due(run: Path) -> None:
    if (record := read_final_evaluation(run)) is not None:
        for part in record.parts.values():
            if part.state != "finished":
                part.state, part.why = "due", ""
        record.write(run)


def _note_end(record: FinalEvaluation, why: str, *, restarts: bool) -> bool:
    """Notes that the workers have ended. Returns whether others are to be started for the rest."""
    running = [part for part in record.parts.values() if part.state == "running"]
    due = [part for part in record.parts.values() if part.state == "due"]
    for part in running:
        part.state, part.why = "failed", why
    if restarts and running and due:
        return True
    for part in due:
        part.state, part.why = "failed", f"not asked, since {why}" if running else why
    return False


def _reason(outcome: RunOutcome) -> str:
    """Why the workers ended, in one line."""
    last = last_line(outcome.lines)
    where = "" if outcome.rank is None else f"rank {outcome.rank} "
    by_itself = outcome.kind == "refused" or outcome.how == describe_exit(1)  # then its last line says why
    if by_itself and last.startswith("kilobatch: "):
        return last.removeprefix("kilobatch: ")
    return f"{where}{outcome.how}".strip() or outcome.kind
