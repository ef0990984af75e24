"""Runs one worker: builds its parts from the run's recipe, then trains or evaluates.

`python -m kilobatch.launch.worker.main RUN [KEY=VALUE ... --evaluate knn,linear [--test DATA]] [--rest] [--data JSON]`
"""

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist

from kilobatch.data import triton_support
from kilobatch.data.errors import UserError, warn
from kilobatch.data.files import is_full_disk
from kilobatch.data.loading.loader import PlainLoader
from kilobatch.launch.processes.exit_status import INTERRUPTED
from kilobatch.launch.recipes import changes
from kilobatch.launch.recipes.data import PreparedData, data_sha256, labelled_of
from kilobatch.launch.recipes.recipe import Recipe, load_recipe, with_images
from kilobatch.launch.recipes.references import refuse_other_teacher
from kilobatch.launch.runs.final_evaluation import REST
from kilobatch.launch.worker import error_file, flight_recorder
from kilobatch.launch.worker.baselines import with_baselines
from kilobatch.launch.worker.components import clean_loader, data_of, images_of, loader_of, method_of, order_of
from kilobatch.launch.worker.devices import with_precision
from kilobatch.launch.worker.error_file import leave, recording_error
from kilobatch.launch.worker.evaluation import after_epoch, evaluate, suite_of
from kilobatch.launch.worker.final_evaluation import EvaluationAfterTraining, EvaluationFailed, evaluate_rest
from kilobatch.launch.worker.pretrained import PinnedReferences
from kilobatch.launch.worker.process_group import World, group_timeout, world_from_environment
from kilobatch.methods import collectives
from kilobatch.methods.memories.queue import steps_to_fill
from kilobatch.methods.method import Method
from kilobatch.trainer.checkpoint.reader import Saved, newest, open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.divergence import describe_way_back
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.evaluate.options import Evaluator
from kilobatch.trainer.evaluate.suite import EvaluationSuite
from kilobatch.trainer.loop import Loop
from kilobatch.trainer.monitor.learning import LearningFacts
from kilobatch.trainer.monitor.monitor import Monitor
from kilobatch.trainer.optim import optimizers
from kilobatch.trainer.optim.schedules import rates_at
from kilobatch.trainer.ranks import phase
from kilobatch.trainer.ranks.garbage import collect_from_now_on
from kilobatch.trainer.ranks.skip_dynamo import skip_dynamo
from kilobatch.trainer.step import NonFinite
from kilobatch.trainer.training_features import TrainingFeatures

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kilobatch.launch.worker.main")
    parser.add_argument("run", type=Path)
    parser.add_argument("--evaluate", type=lambda text: text.split(","), default=[], metavar="NAME,NAME")
    parser.add_argument("--train", metavar="DATA", help="training images for --evaluate, instead of the recipe's")
    parser.add_argument("--test", metavar="DATA", help="test images for --evaluate, instead of the recipe's")
    parser.add_argument(REST, action="store_true", help="do not train; evaluate, at its end, what has no result yet")
    parser.add_argument(
        "--data",
        type=PreparedData.model_validate_json,
        metavar="JSON",
        help="of a launcher: the .beton files that it has found or converted for the recipe",
    )
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the recipe; stand before --evaluate")
    arguments = parser.parse_args()
    stop_requested = _note_stop_signals()  # before anything slow: a signal during the start-up counts as well
    threading.excepthook = _report_thread
    skip_dynamo()
    triton_support.log.setLevel(logging.INFO)
    triton_support.log.addHandler(logging.StreamHandler())
    try:
        recipe, _ = load_recipe(arguments.run / "recipe.yaml", arguments.changes)
        recipe = with_images(recipe, arguments.train, arguments.test)
        with recording_error():
            world = world_from_environment(recipe.run.device)
    except UserError as reason:
        leave(reason)
    with recording_error():
        flight_recorder.dump_on_request(world.rank)
        world.connect(group_timeout(recipe.run.stall_minutes))
    try:
        with recording_error():
            data = data_of(recipe, world, arguments.data)
            if arguments.evaluate:
                named = {"train": arguments.train, "test": arguments.test}
                changes.refuse_other_images(arguments.run, recipe, data, named, arguments.evaluate)
            finished = _work(arguments, recipe, data, world, stop_requested)
    except NonFinite as reason:
        error_file.exit_now(f"kilobatch: {reason}. {_way_back(arguments.run, world, reason)}", 1)
    except EvaluationFailed as reason:
        error_file.exit_now(f"kilobatch: {reason}", 1)
    except BaseException as error:
        leave(error)
    dist.destroy_process_group()
    sys.exit(0 if finished else INTERRUPTED)


def _report_thread(failure: threading.ExceptHookArgs) -> None:
    """Prints what a thread has raised, unless it met a full disk: TensorBoard's thread raises that again in a call."""
    if not is_full_disk(failure.exc_value):
        threading.__excepthook__(failure)


def _way_back(run: Path, world: World, failure: NonFinite) -> str:
    """The checkpoint to go on from, on rank 0, whose message is shown."""
    if world.rank != 0 or failure.losses is None:
        return "The message of rank 0 names the checkpoint to go on from"
    return describe_way_back(run, failure.step, failure.losses)


def _exit_on_signals() -> None:
    """Lets a stop signal end this process at once from now on: the last checkpoint is on disk, so nothing is lost."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, frame: os._exit(INTERRUPTED))


def _note_stop_signals() -> Callable[[], bool]:
    """Has stop signals only noted, since ranks agree on them once a step; the result tells whether one has come."""
    noted: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, frame: noted.append(received))
    return lambda: bool(noted)


def _work(
    arguments: argparse.Namespace,
    recipe: Recipe,
    data: PreparedData,
    world: World,
    stop_requested: Callable[[], bool],
) -> bool:
    """Trains, or evaluates with the evaluators that the arguments name. Returns whether it finished, that is, was not
    stopped."""
    run, evaluators = arguments.run, arguments.evaluate
    if world.rank == 0:
        phase.show_with(partial(print, flush=True))
    phase.announce(f"building {recipe.method.name}, reading {recipe.data.train}")
    saved = _newest(run)
    former_data = frozenset[str]() if evaluators else _identify(run, recipe, data)
    check = partial(refuse_other_teacher, recipe, images_of(data).classes)
    pinned = PinnedReferences(run, check, getattr(recipe.method, "teacher_network", None))
    begins = saved is None and not (evaluators or arguments.rest) and recipe.encoder.start is not None
    start = partial(pinned.load_encoder_start, recipe.encoder) if begins else None
    method = method_of(recipe, data, saved if evaluators else None, start)
    if not (evaluators or arguments.rest):
        method.load_pretrained(pinned.load, fresh=saved is None)
    method.to(world.device)
    torch.manual_seed(recipe.run.seed + 1 + world.rank)  # weights are the same on all ranks; what libraries draw is not
    if evaluators or arguments.rest:
        _exit_on_signals()
        collect_from_now_on()
    if evaluators:
        evaluate(run, recipe, data, world, method, saved, cast(list[Evaluator], evaluators))
        return True
    if arguments.rest:
        evaluate_rest(run, recipe, data, world, method, saved)
        return True
    recipe = with_precision(run, recipe, world.device)
    with Checkpoints(run / "checkpoints", recipe.checkpoint, world.rank, world.size) as checkpoints:
        loop, suite = _build_loop(run, recipe, data, world, method, checkpoints, stop_requested, former_data)
        collect_from_now_on()
        with loop.loader:
            return _train(run, recipe, world, loop, suite, saved)


def _identify(run: Path, recipe: Recipe, data: PreparedData) -> frozenset[str]:
    """Records what the run is, or compares it with that, on rank 0; all ranks call it together.

    A worker's changes of the recipe say how an evaluation asks, which does not count, and where the data lie. Returns
    the SHA-256 of the data before changes that a user has accepted.
    """
    written, _ = load_recipe(run / "recipe.yaml")
    recipe = recipe.model_copy(update={"evaluate": written.evaluate})
    return collectives.from_rank_0(lambda: changes.begin_or_compare(run, recipe, data))


def _build_loop(
    run: Path,
    recipe: Recipe,
    data: PreparedData,
    world: World,
    method: Method,
    checkpoints: Checkpoints,
    stop_requested: Callable[[], bool],
    former_data: frozenset[str],
) -> tuple[Loop, EvaluationSuite | None]:
    """The training, whose loader is to be closed, and the models and images for its evaluators."""
    batch, images = recipe.data.batch, images_of(data)
    optimizer = optimizers.build_optimizer(recipe.optimizer, method, batch)
    engine = Engine(method, optimizer, recipe.engine.options(), world.device, batch // world.size)
    labelled = labelled_of(recipe, data)
    if suite := suite_of(run, recipe, data, world, method, labelled):
        suite = with_baselines(suite, recipe, data, world, in_use=True)
    # Autocast would convert the views to bf16 anyway; on a CPU the decoder makes fp32.
    to_bf16 = recipe.engine.precision == "bf16" and world.device.type == "cuda"
    dtype, options = torch.bfloat16 if to_bf16 else torch.float32, recipe.data.order
    loader = loader_of(
        recipe, data, world, recipe.data.groups, batch, method.jigsaw, labelled, options, order_of(method), dtype
    )

    def clean(size: int | None) -> PlainLoader:
        return clean_loader(recipe, world, data.train.beton, size=size, used=loader.sampler.used)

    loop = Loop(
        engine=engine,
        loader=loader,
        views=recipe.data.groups[0],
        checkpoints=checkpoints,
        epochs=recipe.schedule.epochs,
        features=TrainingFeatures(engine, clean, stop_requested),
        rates=lambda step: rates_at(recipe.schedule, recipe.optimizer, batch, step, loader.steps_per_epoch),
        evaluate=partial(after_epoch, recipe, suite),
        stop_requested=stop_requested,
        monitor=None,
        log_every=recipe.run.log_every,
        recipe=recipe.model_dump(mode="json"),
        images=images.samples,
        classes=images.classes,
        images_sha256=images.sha256,
        data_sha256=data_sha256(recipe, data),
        former_data=former_data,
    )
    return loop, suite


def _train(
    run: Path,
    recipe: Recipe,
    world: World,
    loop: Loop,
    suite: EvaluationSuite | None,
    saved: Saved | None,
) -> bool:
    """Trains from the checkpoint, or from the start, to the end or until it is stopped, and evaluates at the end.
    Returns whether it finished."""
    step = loop.restore(saved) if saved else 0
    if world.rank == 0:
        knn = suite.baselines.conditions() if suite and suite.baselines else ""
        method = loop.engine.method
        changes = method.loss_changes * loop.loader.steps_per_epoch
        facts = LearningFacts(steps_to_fill(method, recipe.data.batch), knn, changes)
        loop.monitor = Monitor(run, loop.steps, step, loop.epochs, facts=facts)
        phase.show_with(loop.monitor.say)
        if saved:
            loop.monitor.say(_describe_start(step, loop, saved))
        if step < loop.steps:
            loop.monitor.say(_describe_training(loop.steps - step, loop.loader.steps_per_epoch, recipe))
    try:
        with recording_error():
            finished = loop.run(step)
        if finished and suite:
            _exit_on_signals()
            if loop.stop_requested():  # noted after the last step: heeded as well
                return False
            per_epoch = loop.loader.steps_per_epoch
            EvaluationAfterTraining(run, recipe, suite, loop.done, per_epoch, loop.monitor, world).run(rest=False)
        if finished and loop.monitor:
            loop.monitor.conclude()
    finally:
        if loop.monitor:
            loop.monitor.close()
    return finished


def _describe_start(step: int, loop: Loop, saved: Saved) -> str:
    if step < loop.steps:
        return f"going on from step {step} of {loop.steps} ({saved.folder.name})"
    past = "" if step == loop.steps else f", past the end of schedule.epochs={loop.epochs}"
    return f"{saved.folder.name} is of step {step} of {loop.steps}{past}: no step is left to train"


def _describe_training(steps: int, per_epoch: int, recipe: Recipe) -> str:
    what = f"{steps:,} {'step' if steps == 1 else 'steps'} of {recipe.data.batch:,} images, {per_epoch:,} an epoch"
    what = what if recipe.engine.precision == "fp32" else f"{what}, in {recipe.engine.precision}"
    return f"training: {what}; the first one takes longer than the others"


def _newest(run: Path) -> Saved | None:
    """The newest whole checkpoint. Rank 0 looks for it, so that files are verified once and all ranks use the same."""
    found = collectives.from_rank_0(lambda: newest(run / "checkpoints", warn))
    return open_saved(found, verify=False) if found else None


if __name__ == "__main__":
    main()
