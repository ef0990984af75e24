"""Runs from start to end on this machine: checked, prepared, run by workers, their state kept."""

from pathlib import Path

from data.convert import prepare, verify
from data.refusal import Refusal
from launch import here, recipe, runs
from launch.checks import check, default_workers
from launch.echo import tell

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
    workers = default_workers(chosen) if workers is None else workers
    check(chosen, workers, settings)
    _prepare(chosen)
    folder = runs.create(chosen.run, Path(name).stem, chosen.dump_yaml(), workers)
    print(f"run: {folder}", flush=True)
    return _run(folder, workers)


def resume(run: str, workers: int | None) -> int:
    """Goes on with a run from its newest whole checkpoint. Returns the exit code."""
    folder = runs.find(run)
    chosen, settings = recipe.load(folder / "recipe.yaml")
    if workers is None:
        workers = runs.state(folder).workers
    check(chosen, workers, settings)
    if runs.status(folder) == "finished":
        raise Refusal(f"{folder} has finished; nothing is left to resume (kilobatch eval {folder}, or export)")
    _prepare(chosen)
    return _run(folder, workers)


def evaluate(run: str, evaluators: list[str], test: str | None, workers: int | None) -> int:
    """Evaluates a run's newest checkpoint, on `test` rather than on the recipe's test images. Returns the exit code."""
    folder = runs.find(run)
    chosen, settings = recipe.load(folder / "recipe.yaml")
    if test is not None:
        chosen = recipe.with_test(chosen, test)
    if chosen.data.test is None:
        raise Refusal(f"{folder} was trained without a test set; give --test, a .beton or a source")
    if not evaluators:
        raise Refusal("nothing to evaluate; give --knn, --linear or --fast-linear")
    if workers is None:
        workers = runs.state(folder).workers
    check(chosen, workers, settings, evaluators)
    if not any((folder / "checkpoints").glob("step-*")):
        raise Refusal(f"{folder} has no checkpoint yet; nothing to evaluate (kilobatch resume {folder})")
    _prepare(chosen)
    return _work(folder, workers, ["--evaluate", ",".join(evaluators), *(["--test", test] if test else [])])


def _prepare(chosen: recipe.Recipe) -> None:
    """Converts what is not yet a .beton, once, rather than in each worker. Raises Refusal, also for two that differ in
    their classes."""
    train = verify(prepare(chosen.data.train, "train")).classes
    if chosen.data.test is None:
        return
    test = verify(prepare(chosen.data.test, "test")).classes
    if train != test:
        differing = sorted(set(train) ^ set(test))
        raise Refusal(
            f"data.test '{chosen.data.test}' ({len(test)} classes) has other classes than data.train "
            f"'{chosen.data.train}' ({len(train)}), so that labels would not match; "
            f"only in one of them: {', '.join(differing[:3]) or 'none, but they stand in another order'}; "
            "use test images of the same classes, or data.test=null"
        )


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
    try:
        finished = here.run(folder, workers, "launch.worker", [str(folder), *arguments])
    except here.WorkerRefused as refusal:
        if message := str(refusal):
            tell(message)
        return REFUSED
    except here.WorkerFailed as failure:
        tell(f"kilobatch: {failure}")
        return FAILED
    return FINISHED if finished else INTERRUPTED
