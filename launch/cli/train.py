"""`kilobatch train`, `resume` and `eval` on this machine: checks the recipe, prepares the data, runs the workers, and
keeps the run's state.

Whatever loads torch is imported in the functions that need it, so that a wrong recipe is refused at once.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.data.files import discard
from kilobatch.launch.pipelines.pipeline import resume_hint
from kilobatch.launch.planning.question import Question
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.processes.output import say, tell
from kilobatch.launch.recipes import changes
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.continuation import Continuation, moved_data, refuse_finished, refuse_missing_data
from kilobatch.launch.recipes.data import PreparedData, prepare_data, with_absolute_paths
from kilobatch.launch.recipes.overrides import with_name
from kilobatch.launch.recipes.recipe import Recipe, load_recipe, read_recipe, with_images
from kilobatch.launch.recipes.references import begun
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs import final_evaluation, job_history, run_folder
from kilobatch.launch.runs.final_evaluation import FinalOutcome
from kilobatch.launch.runs.former_records import FormerRecords, put_back_if_refused
from kilobatch.trainer.checkpoint.description import list_checkpoints

FINISHED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit codes
STATUS: dict[int, run_folder.Status] = {
    FINISHED: "finished",
    FAILED: "failed",
    REFUSED: "failed",
    INTERRUPTED: "interrupted",
}


def train(
    name: str,
    overrides: list[str],
    workers: int | None,
    anyway: bool = False,
    run_name: str | None = None,
    dry_run: bool = False,
) -> int:
    """Creates a run of a recipe and trains it. Returns the exit code. Raises UserError before any worker is started.

    anyway: it is meant although the plan says that it cannot fit into memory; else it is refused then, and no run
    folder is left; run_name: of its folder; None: the recipe's run.name, or the recipe's name and the time; dry_run:
    check all that can be checked without the data, print the resolved recipe, and create nothing.
    """
    recipe, settings = read_recipe(name, with_name(overrides, run_name))
    if workers is None:
        from kilobatch.launch.worker.devices import default_workers

        workers = default_workers(recipe)
    check(recipe, workers, settings)
    _check_device(recipe, workers)
    recipe = with_absolute_paths(recipe)  # so that the run is resumed and evaluated on the same data from any folder
    if dry_run:
        say(recipe.dump_yaml().rstrip())
        tell(
            f"kilobatch: nothing was created; it would train in {run_folder.new_run_path(recipe.run, Path(name).stem)}"
        )
        return FINISHED
    data = prepare_data(recipe)
    folder = run_folder.create_run(recipe.run, Path(name).stem, recipe.dump_yaml(), workers)
    say(f"run: {folder}")
    question = Question(folder, recipe, workers, anyway=anyway)
    code = _train(folder, workers, data, question=question)
    if question.refused:
        discard(folder)
        tell(f"kilobatch: nothing was trained; {folder} is removed")
    return code


def resume(
    run: str,
    workers: int | None,
    continuation: Continuation,
    from_step: int | None = None,
    anyway: bool = False,
    stage: bool = False,
) -> int:
    """Continues a run from its newest complete checkpoint, or from that of a step, which has been checked. Returns the
    exit code.

    continuation: the changes that are meant; for any other change of its data and recipe since it began it is refused;
    anyway: as `train` takes it; stage: its pipeline is what goes on, and what is to be resumed if it ends early.
    """
    folder = run_folder.find_run(run)
    recipe, settings = continuation.read(folder)
    if workers is None:
        workers = run_folder.read_state(folder).workers
    refuse_missing_data(folder, recipe, settings, "resume")
    check(recipe, workers, settings, begun=begun(folder))
    _check_device(recipe, workers)
    refuse_finished(folder, recipe)
    data = prepare_data(recipe)
    found = continuation.compare(folder, recipe, data)
    record = partial(continuation.write, folder, recipe, data, found)
    question = Question(folder, recipe, workers, anyway=anyway)
    return _train(folder, workers, data, record=record, from_step=from_step, question=question, stage=stage)


def evaluate(
    run: str,
    evaluators: list[str],
    overrides: list[str],
    named: Mapping[str, str | None],
    workers: int | None,
    data_roots: Sequence[str] = (),
) -> int:
    """Evaluates a run's newest checkpoint. Returns the exit code.

    evaluators: none: those of evaluate.final, or of these what failed at the training's end.
    overrides: of the section evaluate; named: images for "train" and "test"; None: the recipe's; data_roots: OLD=NEW,
    folders of data that have moved.
    """
    folder = run_folder.find_run(run)
    if foreign := [override for override in overrides if not override.startswith("evaluate.")]:
        raise UserError(
            f"override '{foreign[0]}' is not of the section evaluate; the run is as it was trained, and kilobatch eval "
            "changes only how it is asked, such as evaluate.knn.k=20 (other images: --train, --test)"
        )
    overrides = [*moved_data(load_recipe(folder / "recipe.yaml")[0], data_roots), *overrides]
    recipe, settings = load_recipe(folder / "recipe.yaml", overrides)
    recipe = with_images(recipe, named["train"], named["test"])
    refuse_missing_data(folder, recipe, settings, "eval")
    if recipe.data.test is None:
        raise UserError(f"{folder} was trained without a test set; give --test, a .beton or a source")
    if not (evaluators or any(named.values())) and run_folder.read_state(folder).evaluation == "failed":
        return _evaluate_again(folder, recipe, settings, workers, overrides)
    evaluators = evaluators or list(dict.fromkeys(recipe.evaluate.final))
    if not evaluators:
        raise UserError(
            f"nothing to evaluate: evaluate.final of {folder} is empty; give --knn, --linear, --fast-linear, --moved, "
            "--picture or --classify"
        )
    workers = _workers_of_a_machine(folder) if workers is None else workers
    check(recipe, workers, settings, evaluators)
    _check_device(recipe, workers)
    if not list_checkpoints(folder / "checkpoints"):
        raise UserError(f"{folder} has no checkpoint yet; nothing to evaluate (kilobatch resume {folder})")
    data = prepare_data(recipe)
    changes.refuse_other_images(folder, recipe, data, named, evaluators)
    images = [word for split, spec in named.items() if spec is not None for word in (f"--{split}", spec)]
    arguments = [*overrides, "--evaluate", ",".join(evaluators), *images]
    return conclude(folder, _start_workers(folder, workers, data, arguments))


def _evaluate_again(folder: Path, recipe: Recipe, settings: Settings, workers: int | None, overrides: list[str]) -> int:
    """Asks again what failed in the evaluation at the end of a training. Returns the exit code."""
    workers = _workers_of_a_machine(folder) if workers is None else workers
    during = [recipe.evaluate.during] if recipe.evaluate.every_epochs else []
    check(recipe, workers, settings, [*recipe.evaluate.final, *during])
    _check_device(recipe, workers)
    return _train(folder, workers, prepare_data(recipe), evaluate_again=True, overrides=overrides)


def _workers_of_a_machine(folder: Path) -> int:
    """How many workers of a run's training one machine had: of a job on several nodes, those of a node."""
    job = job_history.read_job_file(folder)
    workers = run_folder.read_state(folder).workers
    return job.workers_per_node if job and job.job_id and job.cluster == "slurm" else workers


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
    question: Question | None = None,
    stage: bool = False,
) -> int:
    """Runs the workers, and keeps the run's state. Returns the exit code.

    record: called first, if the run is free; evaluate_again: the training has finished, and the evaluation is asked
    again for what has no result; from_step: the step of the checkpoint to go on from, None: the newest; overrides: of
    the recipe; question: None: it is not asked whether the training fits into memory; stage: as `resume` takes it.
    """

    def start(more: list[str]) -> RunOutcome:
        return _start_workers(folder, workers, data, [*overrides, *more], question)

    with run_folder.locked(folder):
        goes_on = record is not None and run_folder.written_status(folder) != "new"
        with put_back_if_refused(former := FormerRecords(folder)):
            if from_step is not None and (aside := former.set_newer_aside(from_step)) is not None:
                tell(f"kilobatch: the newer checkpoints are now in {aside}")
            if record:
                record()
            if not evaluate_again:
                job_history.leave_job(folder)
        recipe, _ = load_recipe(folder / "recipe.yaml")
        # Those that train: by default a resume takes as many, and an evaluation may have been given others.
        recorded = run_folder.read_state(folder).workers if evaluate_again else workers
        run_folder.set_status(folder, "running", recorded)
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
            code = conclude(folder, outcome.workers)
            if code == FINISHED or not evaluate_again:
                status, evaluation = STATUS[code], outcome.evaluation
        finally:
            run_folder.set_status(folder, status, recorded, evaluation)
        if goes_on and code == REFUSED and not outcome.workers.stepped and former.put_back():
            tell(f"kilobatch: {folder} is as it was before this command")
    _tell_of_end(folder, code, outcome, resumes=not evaluate_again, stage=stage)
    return code


def _tell_of_end(folder: Path, code: int, outcome: FinalOutcome, *, resumes: bool, stage: bool) -> None:
    """Prints the commands that come next. resumes: it was to train; stage: as `resume` takes it."""
    if outcome.failures:
        ask = f"ask again with: kilobatch eval {folder}"
        tell(f"kilobatch: {folder} is trained, but its evaluation failed: {outcome.failures}; {ask}")
    if resumes and code == FINISHED and not stage and not outcome.failures:
        say(f"trained: {folder}; kilobatch embed {folder} IMAGES features.npz writes its features of images")
    ends = {INTERRUPTED: "stopped", FAILED: "failed", REFUSED: "refused"}
    if resumes and (code in (INTERRUPTED, FAILED) or (code == REFUSED and stage)):
        hint = resume_hint(folder, outcome.workers.lines, alone=not stage)
        if hint or stage:
            tell(f"kilobatch: {ends[code]}{f' in {folder.name}' if stage else ''}{hint}")


def _start_workers(
    folder: Path, workers: int, data: PreparedData, arguments: list[str], question: Question | None = None
) -> RunOutcome:
    from kilobatch.launch.processes import launcher

    say(f"starting {workers} {'worker' if workers == 1 else 'workers'}")
    stall_minutes = load_recipe(folder / "recipe.yaml")[0].run.stall_minutes
    run = partial(
        launcher.run_workers,
        folder,
        workers,
        "kilobatch.launch.worker.main",
        [str(folder), *arguments, *data.arguments()],
        stall_minutes,
    )
    if question is None:
        return run()
    with closing(question):
        question.ask(data)
        return question.explain(run(question=question))


def conclude(folder: Path, outcome: RunOutcome) -> int:
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
        return f"the run hangs: {outcome.how}; logs of all ranks, with their stacks: {folder / 'logs'}"
    what = "hangs" if outcome.kind == "stalled" else "failed first"
    if not outcome.lines:
        last_lines = "it wrote nothing"
    elif outcome.rank == 0:
        last_lines = "its last lines stand above"
    else:
        last_lines = "its last lines:\n" + "\n".join(f"    {line}" for line in outcome.lines)
    log = folder / "logs" / f"rank-{outcome.rank}.log"
    return f"rank {outcome.rank} {what}: {outcome.how}; log: {log}; {last_lines}"
