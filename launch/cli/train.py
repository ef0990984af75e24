"""Runs from start to end on this machine: checked, prepared, run by workers, their state kept.

What imports torch stands in the functions that need it, so that a bad recipe is refused before it is loaded.
"""

from pathlib import Path

from kilobatch.data.errors import Refusal
from kilobatch.launch.processes.exit_status import Ending
from kilobatch.launch.processes.output import tell
from kilobatch.launch.recipes import recipe
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.data import prepare_data
from kilobatch.launch.recipes.references import begun
from kilobatch.launch.runs import run_folder as runs

FINISHED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit codes
STATUS: dict[int, runs.Status] = {
    FINISHED: "finished",
    FAILED: "failed",
    REFUSED: "failed",
    INTERRUPTED: "interrupted",
}


def train(name: str, overrides: list[str], workers: int | None) -> int:
    """Makes a run of a recipe and trains it. Returns the exit code; raises Refusal before anything is started."""
    chosen, settings = recipe.read(name, overrides)
    if workers is None:
        from kilobatch.launch.worker.devices import default_workers

        workers = default_workers(chosen)
    check(chosen, workers, settings)
    _check_device(chosen, workers)
    prepare_data(chosen)
    folder = runs.create(chosen.run, Path(name).stem, chosen.dump_yaml(), workers)
    print(f"run: {folder}", flush=True)
    return _run(folder, workers)


def resume(run: str, workers: int | None) -> int:
    """Goes on with a run from its newest whole checkpoint. Returns the exit code."""
    folder = runs.find(run)
    chosen, settings = recipe.load(folder / "recipe.yaml")
    if workers is None:
        workers = runs.state(folder).workers
    check(chosen, workers, settings, begun=begun(folder))
    _check_device(chosen, workers)
    if runs.status(folder) == "finished":
        raise Refusal(f"{folder} has finished; nothing is left to resume (kilobatch eval {folder}, or export)")
    prepare_data(chosen)
    return _run(folder, workers)


def evaluate(run: str, evaluators: list[str], changes: list[str], test: str | None, workers: int | None) -> int:
    """Evaluates a run's newest checkpoint, on `test` rather than on the recipe's test images. changes: overrides of
    the section evaluate. Returns the exit code."""
    folder = runs.find(run)
    if other := [change for change in changes if not change.startswith("evaluate.")]:
        raise Refusal(
            f"override '{other[0]}' is not of the section evaluate; the run is as it was trained, and kilobatch eval "
            "changes only how it is asked, such as evaluate.knn.k=20 (other test images: --test)"
        )
    chosen, settings = recipe.load(folder / "recipe.yaml", changes)
    if test is not None:
        chosen = recipe.with_test(chosen, test)
    if chosen.data.test is None:
        raise Refusal(f"{folder} was trained without a test set; give --test, a .beton or a source")
    if not evaluators:
        raise Refusal("nothing to evaluate; give --knn, --linear, --fast-linear or --classify")
    if workers is None:
        workers = runs.state(folder).workers
    check(chosen, workers, settings, evaluators)
    _check_device(chosen, workers)
    if not any((folder / "checkpoints").glob("step-*")):
        raise Refusal(f"{folder} has no checkpoint yet; nothing to evaluate (kilobatch resume {folder})")
    prepare_data(chosen)
    on_others = ["--test", test] if test else []
    return _work(folder, workers, [*changes, "--evaluate", ",".join(evaluators), *on_others])


def _check_device(chosen: recipe.Recipe, workers: int) -> None:
    """Raises Refusal where this machine lacks the devices. They are asked last, as that loads torch."""
    from kilobatch.launch.worker.devices import check_device

    check_device(chosen, workers)


def _run(folder: Path, workers: int) -> int:
    """Trains, and keeps the run's state."""
    way_on = f"resume with: kilobatch resume {folder}"
    with runs.claimed(folder):
        runs.set_status(folder, "running", workers)
        code = INTERRUPTED  # where the launcher itself ends: the workers are gone
        try:
            code = _work(folder, workers, [])
        finally:
            runs.set_status(folder, STATUS[code], workers)
    if code == INTERRUPTED:
        tell(f"kilobatch: stopped; {way_on}")
    elif code == FAILED:
        tell(way_on)
    return code


def _work(folder: Path, workers: int, arguments: list[str]) -> int:
    """Runs the workers and says why they ended. Returns the exit code."""
    from kilobatch.launch.processes import launcher as here

    stall_minutes = recipe.load(folder / "recipe.yaml")[0].run.stall_minutes
    ending = here.run(folder, workers, "kilobatch.launch.worker.main", [str(folder), *arguments], stall_minutes)
    match ending.kind:
        case "finished":
            return FINISHED
        case "interrupted":
            return INTERRUPTED
        case "refused":
            if ending.rank != 0:  # what rank 0 says stands on this terminal
                tell("\n".join(ending.lines))
            return REFUSED
        case _:
            tell(f"kilobatch: {_epitaph(ending, folder)}")
            return FAILED


def _epitaph(ending: Ending, folder: Path) -> str:
    if ending.rank is None:
        return f"the run hangs: {ending.how}; logs with all stacks: {folder / 'logs'}"
    what = "hangs" if ending.kind == "stalled" else "failed first"
    if not ending.lines:
        said = "it wrote nothing"
    elif ending.rank == 0:
        said = "its last lines stand above"
    else:
        said = "its last lines:\n" + "\n".join(f"    {line}" for line in ending.lines)
    log = folder / "logs" / f"rank-{ending.rank}.log"
    return f"rank {ending.rank} {what}: {ending.how}; log: {log}; {said}"
