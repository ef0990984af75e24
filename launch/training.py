"""Runs from start to end on this machine: checked, prepared, run by workers, their state kept."""

import sys
from pathlib import Path

from data.convert import prepare
from data.refusal import Refusal
from launch import here, recipe, runs
from launch.checks import check, default_workers

FINISHED, FAILED, INTERRUPTED = 0, 1, 130  # exit codes; refusals exit with 2


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
    check(chosen, workers, settings)
    if not any((folder / "checkpoints").glob("step-*")):
        raise Refusal(f"{folder} has no checkpoint yet; nothing to evaluate (kilobatch resume {folder})")
    _prepare(chosen)
    try:
        asked = ["--evaluate", ",".join(evaluators), *(["--test", test] if test else [])]
        finished = here.run(folder, workers, "launch.worker", [str(folder), *asked])
    except here.WorkerFailed as failure:
        print(f"kilobatch: {failure}", file=sys.stderr)
        return FAILED
    return FINISHED if finished else INTERRUPTED


def _prepare(chosen: recipe.Recipe) -> None:
    """Converts what is not yet a .beton, once, rather than in each worker."""
    prepare(chosen.data.train, "train")
    if chosen.data.test is not None:
        prepare(chosen.data.test, "test")


def _run(folder: Path, workers: int) -> int:
    way_on = f"resume with: kilobatch resume {folder}"
    with runs.claimed(folder):
        runs.set_status(folder, "running", workers)
        try:
            finished = here.run(folder, workers, "launch.worker", [str(folder)])
        except here.WorkerFailed as failure:
            runs.set_status(folder, "failed", workers)
            print(f"kilobatch: {failure}\n{way_on}", file=sys.stderr)
            return FAILED
        except BaseException:  # the launcher's own end, such as a closed terminal: the workers are gone
            runs.set_status(folder, "interrupted", workers)
            raise
        runs.set_status(folder, "finished" if finished else "interrupted", workers)
    if not finished:
        print(f"kilobatch: stopped; {way_on}", file=sys.stderr)
        return INTERRUPTED
    return FINISHED
