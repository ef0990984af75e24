"""`kilobatch train`, `resume` and `eval` on this machine: checks the recipe, prepares the data, runs the workers, and
keeps the run's state.

Whatever loads torch is imported in the functions that need it, so that a wrong recipe is refused at once.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.processes.output import say, tell
from kilobatch.launch.recipes import changes
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.data import PreparedData, prepare_data, with_absolute_paths
from kilobatch.launch.recipes.recipe import Recipe, load_recipe, read_recipe, with_images
from kilobatch.launch.recipes.references import begun
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs import final_evaluation, run_folder
from kilobatch.launch.runs.earlier_checkpoint import set_newer_aside
from kilobatch.trainer.checkpoint.description import list_checkpoints

FINISHED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit codes
STATUS: dict[int, run_folder.Status] = {
    FINISHED: "finished",
    FAILED: "failed",
    REFUSED: "failed",
    INTERRUPTED: "interrupted",
}


def train(name: str, overrides: list[str], workers: int | None) -> int:
    """Creates a run of a recipe and trains it. Returns the exit code. Raises UserError before any worker is started."""
    recipe, settings = read_recipe(name, overrides)
    if workers is None:
        from kilobatch.launch.worker.devices import default_workers

        workers = default_workers(recipe)
    check(recipe, workers, settings)
    _check_device(recipe, workers)
    recipe = with_absolute_paths(recipe)  # so that the run is resumed and evaluated on the same data from any folder
    data = prepare_data(recipe)
    folder = run_folder.create_run(recipe.run, Path(name).stem, recipe.dump_yaml(), workers)
    say(f"run: {folder}")
    return _train(folder, workers, data)


def resume(run: str, workers: int | None, accept_changes: bool = False, from_step: int | None = None) -> int:
    """Continues a run from its newest complete checkpoint, or from that of a step, which has been checked. Returns the
    exit code.

    accept_changes: whether changes of its data and recipe since it began are meant; else it is refused for them.
    """
    folder = run_folder.find_run(run)
    recipe, settings = load_recipe(folder / "recipe.yaml")
    if workers is None:
        workers = run_folder.read_state(folder).workers
    check(recipe, workers, settings, begun=begun(folder))
    _check_device(recipe, workers)
    if run_folder.status(folder) == "finished":
        raise UserError(f"{folder} has finished; nothing is left to resume (kilobatch eval {folder}, or export)")
    data = prepare_data(recipe)
    found = changes.changes_of(folder, recipe, data)
    if not accept_changes:
        changes.refuse_changes(folder, found)
    record = partial(changes.record_accepted, folder, recipe, data, found) if found else None
    return _train(folder, workers, data, record=record, from_step=from_step)


def evaluate(
    run: str,
    evaluators: list[str],
    overrides: list[str],
    named: Mapping[str, str | None],
    workers: int | None,
) -> int:
    """Evaluates a run's newest checkpoint. Returns the exit code.

    overrides: of the section evaluate; named: images for "train" and "test"; None: the recipe's.
    """
    folder = run_folder.find_run(run)
    if foreign := [override for override in overrides if not override.startswith("evaluate.")]:
        raise UserError(
            f"override '{foreign[0]}' is not of the section evaluate; the run is as it was trained, and kilobatch eval "
            "changes only how it is asked, such as evaluate.knn.k=20 (other images: --train, --test)"
        )
    recipe, settings = load_recipe(folder / "recipe.yaml", overrides)
    recipe = with_images(recipe, named["train"], named["test"])
    if recipe.data.test is None:
        raise UserError(f"{folder} was trained without a test set; give --test, a .beton or a source")
    if not (evaluators or any(named.values())) and run_folder.read_state(folder).evaluation == "failed":
        return _evaluate_again(folder, recipe, settings, workers, overrides)
    if not evaluators:
        raise UserError("nothing to evaluate; give --knn, --linear, --fast-linear or --classify")
    if workers is None:
        workers = run_folder.read_state(folder).workers
    check(recipe, workers, settings, evaluators)
    _check_device(recipe, workers)
    if not list_checkpoints(folder / "checkpoints"):
        raise UserError(f"{folder} has no checkpoint yet; nothing to evaluate (kilobatch resume {folder})")
    data = prepare_data(recipe)
    changes.refuse_other_images(folder, recipe, data, named, evaluators)
    images = [word for split, spec in named.items() if spec is not None for word in (f"--{split}", spec)]
    arguments = [*overrides, "--evaluate", ",".join(evaluators), *images]
    return _conclude(folder, _start_workers(folder, workers, data, arguments))


def _evaluate_again(folder: Path, recipe: Recipe, settings: Settings, workers: int | None, overrides: list[str]) -> int:
    """Asks again what failed in the evaluation at the end of a training. Returns the exit code."""
    if workers is None:
        workers = run_folder.read_state(folder).workers
    check(recipe, workers, settings, begun=begun(folder))
    _check_device(recipe, workers)
    return _train(folder, workers, prepare_data(recipe), evaluate_again=True, overrides=overrides)


def _check_device(recipe: Recipe, workers: int) -> None:
    """Raises UserError where this machine lacks the devices. It is called after all other checks: it loads torch."""
    from kilobatch.launch.worker.devices import check_device

    check_device(recipe, workers)


def _train(
    folder: Path,
    workers: int,
    data: PreparedData,
    *,
    record: Callable[[], None] | None = None,
    evaluate_again: bool = False,
    from_step: int | None = None,
    overrides: Sequence[str] = (),
) -> int:
    """Runs the workers, and keeps the run's state. Returns the exit code.

    record: called first, if the run is free; evaluate_again: the training has finished, and the evaluation is asked
    again for what has no result; from_step: the step of the checkpoint to go on from, None: the newest; overrides: of
    the recipe.
    """
    resume_hint = f"resume with: kilobatch resume {folder}"
    recipe, _ = load_recipe(folder / "recipe.yaml")

    def start(more: list[str]) -> RunOutcome:
        return _start_workers(folder, workers, data, [*overrides, *more])

    with run_folder.locked(folder):
        if from_step is not None and (aside := set_newer_aside(folder, from_step)) is not None:
            tell(f"kilobatch: the newer checkpoints are now in {aside}")
        if record:
            record()
        run_folder.set_status(folder, "running", workers)
        # Kept where an exception ends the launcher: it has ended its workers then.
        status: run_folder.Status = "finished" if evaluate_again else "interrupted"
        evaluation: run_folder.EvaluationStatus | None = "failed" if evaluate_again else None
        try:
            outcome = final_evaluation.run_to_the_end(
                folder,
                recipe.schedule.epochs,
                start,
                evaluates=recipe.data.test is not None,
                rest=evaluate_again,
            )
            code = _conclude(folder, outcome.workers)
            if code == FINISHED or not evaluate_again:
                status, evaluation = STATUS[code], outcome.evaluation
        finally:
            run_folder.set_status(folder, status, workers, evaluation)
    if outcome.failures:
        ask = f"ask again with: kilobatch eval {folder}"
        tell(f"kilobatch: {folder} is trained, but its evaluation failed: {outcome.failures}; {ask}")
    if evaluate_again:
        return code
    if code == INTERRUPTED:
        tell(f"kilobatch: stopped; {resume_hint}")
    elif code == FAILED and not any("kilobatch resume" in line for line in outcome.workers.lines):
        tell(resume_hint)
    return code


def _start_workers(folder: Path, workers: int, data: PreparedData, arguments: list[str]) -> RunOutcome:
    from kilobatch.launch.processes import launcher

    stall_minutes = load_recipe(folder / "recipe.yaml")[0].run.stall_minutes
    return launcher.run_workers(
        folder,
        workers,
        "kilobatch.launch.worker.main",
        [str(folder), *arguments, *data.arguments()],
        stall_minutes,
    )


def _conclude(folder: Path, outcome: RunOutcome) -> int:
    """Prints why the workers ended. Returns the exit code."""
    match outcome.kind:
        case "finished":
            return FINISHED
        case "interrupted":
            return INTERRUPTED
        case "refused":
            if outcome.rank != 0:  # rank 0 writes to this terminal, so its message has been seen
                tell("\n".join(outcome.lines))
            return REFUSED
        case _:
            tell(f"kilobatch: {_failure_message(outcome, folder)}")
            return FAILED


def _failure_message(outcome: RunOutcome, folder: Path) -> str:
    if outcome.rank is None:
        return f"the run hangs: {outcome.how}; logs with all stacks: {folder / 'logs'}"
    what = "hangs" if outcome.kind == "stalled" else "failed first"
    if not outcome.lines:
        last_lines = "it wrote nothing"
    elif outcome.rank == 0:
        last_lines = "its last lines stand above"
    else:
        last_lines = "its last lines:\n" + "\n".join(f"    {line}" for line in outcome.lines)
    log = folder / "logs" / f"rank-{outcome.rank}.log"
    return f"rank {outcome.rank} {what}: {outcome.how}; log: {log}; {last_lines}"
