"""What each worker runs: `python -m launch.worker RUN [--evaluate knn,linear]`. Builds the parts and wires them."""

import argparse
import hashlib
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import NoReturn, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from data.beton import Info, verify
from data.convert import prepare
from data.kernels import chosen as kernels
from data.labels import labelled
from data.loader import Loader, PlainLoader
from data.refusal import Refusal
from data.threads import spare_threads
from data.views import Views
from launch import recipe, trained
from launch.ending import INTERRUPTED, REFUSED
from launch.recipe import Recipe, with_test
from launch.trained import Pinned
from launch.world import World, world
from methods.method import Method
from trainer import optimizers
from trainer.checkpoint import Checkpoints, Saved, newest, open_saved
from trainer.engine import Engine
from trainer.evaluate import linear, moved, picture
from trainer.evaluate.options import Evaluator
from trainer.evaluate.scene import Scene
from trainer.loop import Loop
from trainer.monitor import Monitor
from trainer.schedules import lr_at
from trainer.step import NonFinite

_prepared = cache(prepare)  # the launcher has converted already: this finds and checks, once for each

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m launch.worker")
    parser.add_argument("run", type=Path)
    parser.add_argument("--evaluate", type=lambda text: text.split(","), default=[], metavar="NAME,NAME")
    parser.add_argument("--test", metavar="DATA", help="test images for --evaluate, instead of the recipe's")
    arguments = parser.parse_args()
    asked = _listen()  # before anything slow: a signal during the start-up counts as well
    kernels.log.setLevel(logging.INFO)
    kernels.log.addHandler(logging.StreamHandler())
    chosen, _ = recipe.load(arguments.run / "recipe.yaml")
    if arguments.test:
        chosen = with_test(chosen, arguments.test)
    here = world(chosen.run.device)
    here.connect()
    try:
        finished = _work(arguments.run, chosen, here, asked, arguments.evaluate)
    except Refusal as reason:
        _leave(f"kilobatch: {reason}", REFUSED)
    except NonFinite as reason:
        _leave(f"kilobatch: {reason}", 1)
    except BaseException:
        _leave(traceback.format_exc(), 1)
    dist.destroy_process_group()
    sys.exit(0 if finished else INTERRUPTED)


def _leave(message: str, code: int) -> NoReturn:
    """Ends at once. The others wait in a collective for this rank, so no orderly end may wait for them."""
    print(message, file=sys.stderr, flush=True)
    os._exit(code)


def _stop_at_once() -> None:
    """From here on nothing is lost by an end at any moment: the last checkpoint is on disk."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, frame: os._exit(INTERRUPTED))


def _listen() -> Callable[[], bool]:
    """Signals are only noted: ranks agree on them once a step."""
    noted: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda received, frame: noted.append(received))
    return lambda: bool(noted)


def _work(run: Path, chosen: Recipe, here: World, asked: Callable[[], bool], evaluators: list[str]) -> bool:
    method, saved = _method(chosen), _newest(run, here)
    if not evaluators:
        method.take(Pinned(run, here.rank, here.size).trained, fresh=saved is None)
    method.to(here.device)
    torch.manual_seed(chosen.run.seed + 1 + here.rank)  # weights are the same on all ranks; dropout is not
    if evaluators:
        _stop_at_once()
        _evaluate(run, chosen, here, method, saved, cast(list[Evaluator], evaluators))
        return True
    with Checkpoints(run / "checkpoints", chosen.checkpoint, here.rank, here.size) as checkpoints:
        return _train(run, chosen, here, method, saved, checkpoints, asked)


def _train(
    run: Path,
    chosen: Recipe,
    here: World,
    method: Method,
    saved: Saved | None,
    checkpoints: Checkpoints,
    asked: Callable[[], bool],
) -> bool:
    batch, images = chosen.data.batch, _images(chosen)
    optimizer = optimizers.build(chosen.optimizer, method, batch)
    engine = Engine(method, optimizer, chosen.engine, here.device, batch // here.size)
    base = optimizers.scaled_lr(chosen.optimizer, batch)
    scene = _scene(run, chosen, here, method)
    some = labelled(_prepared(chosen.data.train, "train"), chosen.data.labels)
    # bf16 is what autocast makes of the views anyway; on a CPU they come out of the decoder as fp32.
    halved = chosen.engine.precision == "bf16" and here.device.type == "cuda"
    dtype = torch.bfloat16 if halved else torch.float32
    with _loader(chosen, here, chosen.data.views, batch, method.jigsaw, some, dtype) as loader:
        loop = Loop(
            engine=engine,
            loader=loader,
            views=chosen.data.views,
            checkpoints=checkpoints,
            epochs=chosen.schedule.epochs,
            learning_rate=lambda step: lr_at(chosen.schedule, base, step, loader.steps_per_epoch),
            evaluate=partial(_after_epoch, chosen, scene),
            asked_to_stop=asked,
            monitor=None,
            log_every=chosen.run.log_every,
            recipe=chosen.model_dump(mode="json"),
            images=images.samples,
            classes=len(images.classes),
            data_sha256=images.sha256 if some is None else _sha256(images.sha256.encode(), some.tobytes()),
        )
        step = loop.restore(saved) if saved else 0
        if here.rank == 0:
            loop.monitor = Monitor(run, loop.steps, step, loop.epochs)
            if saved:
                loop.monitor.say(f"going on from step {step} of {loop.steps} ({saved.folder.name})")
        try:
            finished = loop.run(step)
            if finished and scene:
                _stop_at_once()
                _final(run, chosen, scene, loop)
        finally:
            if loop.monitor:
                loop.monitor.close()
    return finished


def _images(chosen: Recipe) -> Info:
    """What the training images are."""
    return verify(_prepared(chosen.data.train, "train"))


def _sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _method(chosen: Recipe) -> Method:
    """As the run's seed initialises it: the same on every rank."""
    torch.manual_seed(chosen.run.seed)
    images = _images(chosen)
    return trained.build(chosen, images.samples, len(images.classes))


def _loader(
    chosen: Recipe,
    here: World,
    views: Views,
    batch: int,
    jigsaw: bool = False,
    some: NDArray[np.int64] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """The training images, augmented. some: those that have labels; None: all."""
    return Loader(
        _prepared(chosen.data.train, "train"),
        views,
        batch=batch,
        rank=here.rank,
        world=here.size,
        seed=chosen.run.seed,
        threads=_threads(chosen, here),
        device=here.device,
        jigsaw=jigsaw,
        labelled=some,
        drop_unlabelled=chosen.data.unlabelled == "drop",
        dtype=dtype,
    )


def _threads(chosen: Recipe, here: World) -> int:
    return chosen.data.threads or spare_threads(here.local_size)


def _scene(run: Path, chosen: Recipe, here: World, method: Method) -> Scene | None:
    """What evaluators look at; None where the recipe has no test set."""
    if chosen.data.test is None:
        return None
    train, test = _prepared(chosen.data.train, "train"), _prepared(chosen.data.test, "test")
    views, options = chosen.data.views, chosen.evaluate

    def clean(beton: Path) -> PlainLoader:
        return PlainLoader(
            beton,
            views.size,
            views.mean,
            views.std,
            batch=256,
            rank=here.rank,
            world=here.size,
            threads=_threads(chosen, here),
            device=here.device,
        )

    return Scene(
        method=method,
        untrained=lambda: _method(chosen).to(here.device),
        train=clean(train),
        test=clean(test),
        probe=lambda: _loader(chosen, here, linear.probe_views(views), options.linear.batch),
        views=views,
        classes=verify(train).classes,
        options=options,
        folder=run,
    )


def _newest(run: Path, here: World) -> Saved | None:
    """The newest whole checkpoint, as rank 0 finds it: each file is read once, and all ranks take the same."""

    def report(damage: str) -> None:
        print(f"kilobatch: warning: {damage}", file=sys.stderr, flush=True)

    found: list[Path | None] = [newest(run / "checkpoints", report) if here.rank == 0 else None]
    if here.size > 1:
        dist.broadcast_object_list(found, src=0)
    return open_saved(found[0], verify=False) if found[0] else None


def _after_epoch(chosen: Recipe, scene: Scene | None, epoch: int) -> dict[str, float]:
    every = chosen.evaluate.every_epochs
    return dict(scene.evaluate(chosen.evaluate.during)) if scene and every and epoch % every == 0 else {}


def _final(run: Path, chosen: Recipe, scene: Scene, loop: Loop) -> None:
    """What the recipe asks for when training has ended."""
    values: dict[str, float] = {}
    for name in chosen.evaluate.final:
        values |= dict(scene.evaluate(name))
    seen = scene.gallery(scene.test, picture.ASKED)
    if loop.monitor:
        loop.monitor.log(loop.steps, {f"final/{name}": value for name, value in values.items()})
        loop.monitor.embedding(loop.steps, seen, scene.classes)
        _tell(values, chosen, scene)
        if "picture" in chosen.evaluate.final:
            print(f"picture: {run / 'pictures' / 'neighbours.png'}", flush=True)


def _evaluate(
    run: Path, chosen: Recipe, here: World, method: Method, saved: Saved | None, evaluators: list[Evaluator]
) -> None:
    """The newest checkpoint's answers, on the terminal and in evaluations.jsonl."""
    scene = _scene(run, chosen, here, method)
    if saved is None or scene is None:
        raise Refusal(f"{run} has no {'checkpoint' if saved is None else 'test set (data.test is null)'} to evaluate")
    trained.restore(method, saved.whole)
    values = {key: value for name in evaluators for key, value in scene.evaluate(name)}
    if here.rank == 0:
        print(f"{run}, {saved.folder.name}, {chosen.data.test}:")
        _tell(values, chosen, scene)
        with (run / "evaluations.jsonl").open("a") as file:
            line = {"step": saved.step, "test": chosen.data.test, **values}
            file.write(json.dumps(line) + "\n")


def _tell(values: dict[str, float], chosen: Recipe, scene: Scene) -> None:
    from rich.console import Console

    console = Console()
    if any(name.startswith("moved/") for name in values):
        console.print(moved.table(values))
    for name, value in values.items():
        if not name.startswith("moved/"):
            console.print(f"{LABELS[name].format(knn=chosen.evaluate.knn)}: {value:.2%}")


LABELS = {
    "classify/top1": "top-1 of its classifier",
    "classify/top5": "top-5 of its classifier",
    "classify_moved/top1": "top-1 of its classifier on moved images",
    "classify_moved/top5": "top-5 of its classifier on moved images",
    "knn/top1": "k-NN top-1 (k {knn.k}, temperature {knn.temperature:g})",
    "linear/top1": "linear top-1 (the papers' protocol: SGD on frozen features, augmented)",
    "linear/top5": "linear top-5 (the papers' protocol)",
    "fast_linear/top1": "fast linear top-1 (L-BFGS on cached features; not the papers' protocol)",
    "fast_linear/top5": "fast linear top-5 (L-BFGS on cached features)",
}

if __name__ == "__main__":
    main()
