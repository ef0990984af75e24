"""`kilobatch train`, `resume` and `eval` on this machine: checks the recipe, prepares the data, runs the workers, and
keeps the run's state.

Whatever loads torch is imported in the functions that need it, so that a wrong recipe is refused at once.
"""

from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.processes.output import say, tell
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.data import PreparedData, prepare_data, with_absolute_paths
from kilobatch.launch.recipes.recipe import Recipe, load_recipe, read_recipe, with_test
from kilobatch.launch.recipes.references import begun
from kilobatch.launch.runs import run_folder
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


def resume(run: str, workers: int | None) -> int:
    """Continues a run from its newest complete checkpoint. Returns the exit code."""
    folder = run_folder.find_run(run)
    recipe, settings = load_recipe(folder / "recipe.yaml")
    if workers is None:
        workers = run_folder.read_state(folder).workers
    check(recipe, workers, settings, begun=begun(folder))
    _check_device(recipe, workers)
    if run_folder.status(folder) == "finished":
        raise UserError(f"{folder} has finished; nothing is left to resume (kilobatch eval {folder}, or export)")
    return _train(folder, workers, prepare_data(recipe))


def evaluate(run: str, evaluators: list[str], changes: list[str], test: str | None, workers: int | None) -> int:
    """Evaluates a run's newest checkpoint. Returns the exit code.

    changes: overrides of the section evaluate; test: test images, where they are not to be the recipe's.
    """
    folder = run_folder.find_run(run)
    if foreign := [change for change in changes if not change.startswith("evaluate.")]:
        raise UserError(
            f"override '{foreign[0]}' is not of the section evaluate; the run is as it was trained, and kilobatch eval "
            "changes only how it is asked, such as evaluate.knn.k=20 (other test images: --test)"
        )
    recipe, settings = load_recipe(folder / "recipe.yaml", changes)
    if test is not None:
        recipe = with_test(recipe, test)
    if recipe.data.test is None:
        raise UserError(f"{folder} was trained without a test set; give --test, a .beton or a source")
    if not evaluators:
        raise UserError("nothing to evaluate; give --knn, --linear, --fast-linear or --classify")
    if workers is None:
        workers = run_folder.read_state(folder).workers
    check(recipe, workers, settings, evaluators)
    _check_device(recipe, workers)
    if not list_checkpoints(folder / "checkpoints"):
        raise UserError(f"{folder} has no checkpoint yet; nothing to evaluate (kilobatch resume {folder})")
    data = prepare_data(recipe)
    test_option = ["--test", test] if test else []
    return _run_workers(folder, workers, data, [*changes, "--evaluate", ",".join(evaluators), *test_option])


def _check_device(recipe: Recipe, workers: int) -> None:
    """Raises UserError where this machine lacks the devices. It is called after all other checks: it loads torch."""
    from kilobatch.launch.worker.devices import check_device

    check_device(recipe, workers)


def _train(folder: Path, workers: int, data: PreparedData) -> int:
    """Runs the workers, and keeps the run's state. Returns the exit code."""
    resume_hint = f"resume with: kilobatch resume {folder}"
    with run_folder.locked(folder):
        run_folder.set_status(folder, "running", workers)
        code = INTERRUPTED  # kept where an exception ends the launcher: it has ended its workers then
        try:
            code = _run_workers(folder, workers, data, [])
        finally:
            run_folder.set_status(folder, STATUS[code], workers)
    if code == INTERRUPTED:
        tell(f"kilobatch: stopped; {resume_hint}")
    elif code == FAILED:
        tell(resume_hint)
    return code


def _run_workers(folder: Path, workers: int, data: PreparedData, arguments: list[str]) -> int:
    """Runs the workers and prints why they ended. Returns the exit code."""
    from kilobatch.launch.processes import launcher

    stall_minutes = load_recipe(folder / "recipe.yaml")[0].run.stall_minutes
    outcome = launcher.run_workers(
        folder,
        workers,
        "kilobatch.launch.worker.main",
        [str(folder), *arguments, *data.arguments()],
        stall_minutes,
    )
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
