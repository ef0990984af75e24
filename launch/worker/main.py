"""What each worker runs, `python -m kilobatch.launch.worker.main RUN [KEY=VALUE ... --evaluate knn,linear [--test
DATA]]`: builds the parts and wires them."""

import argparse
import hashlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NoReturn, cast

import torch
import torch.distributed as dist

from kilobatch.data import triton_support as kernels
from kilobatch.data.errors import Refusal
from kilobatch.data.loading.labels import labelled
from kilobatch.launch.processes.exit_status import INTERRUPTED, REFUSED
from kilobatch.launch.recipes import recipe
from kilobatch.launch.recipes.recipe import Recipe, with_test
from kilobatch.launch.worker.components import images_of, loader_of, method_of, prepared
from kilobatch.launch.worker.evaluation import after_epoch, evaluate, final, scene_of
from kilobatch.launch.worker.pretrained import Pinned
from kilobatch.launch.worker.process_group import World, world
from kilobatch.methods.method import Method
from kilobatch.trainer.checkpoint.reader import Saved, newest, open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.evaluate.options import Evaluator
from kilobatch.trainer.loop import Loop
from kilobatch.trainer.monitor.monitor import Monitor
from kilobatch.trainer.optim import optimizers
from kilobatch.trainer.optim.schedules import lr_at
from kilobatch.trainer.ranks.skip_dynamo import spare_the_compiler
from kilobatch.trainer.step import NonFinite

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kilobatch.launch.worker.main.main")
    parser.add_argument("run", type=Path)
    parser.add_argument("--evaluate", type=lambda text: text.split(","), default=[], metavar="NAME,NAME")
    parser.add_argument("--test", metavar="DATA", help="test images for --evaluate, instead of the recipe's")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE", help="of the recipe; stand before --evaluate")
    arguments = parser.parse_args()
    asked = _listen()  # before anything slow: a signal during the start-up counts as well
    spare_the_compiler()
    kernels.log.setLevel(logging.INFO)
    kernels.log.addHandler(logging.StreamHandler())
    chosen, _ = recipe.load(arguments.run / "recipe.yaml", arguments.changes)
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
    method, saved = method_of(chosen), _newest(run, here)
    if not evaluators:
        method.take(Pinned(run, here.rank, here.size).trained, fresh=saved is None)
    method.to(here.device)
    torch.manual_seed(chosen.run.seed + 1 + here.rank)  # weights are the same on all ranks; dropout is not
    if evaluators:
        _stop_at_once()
        evaluate(run, chosen, here, method, saved, cast(list[Evaluator], evaluators))
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
    batch, images = chosen.data.batch, images_of(chosen)
    optimizer = optimizers.build(chosen.optimizer, method, batch)
    engine = Engine(method, optimizer, chosen.engine, here.device, batch // here.size)
    base = optimizers.scaled_lr(chosen.optimizer, batch)
    scene = scene_of(run, chosen, here, method)
    some = labelled(prepared(chosen.data.train, "train"), chosen.data.labels)
    # bf16 is what autocast makes of the views anyway; on a CPU they come out of the decoder as fp32.
    halved = chosen.engine.precision == "bf16" and here.device.type == "cuda"
    dtype = torch.bfloat16 if halved else torch.float32
    with loader_of(chosen, here, chosen.data.views, batch, method.jigsaw, some, dtype) as loader:
        loop = Loop(
            engine=engine,
            loader=loader,
            views=chosen.data.views,
            checkpoints=checkpoints,
            epochs=chosen.schedule.epochs,
            learning_rate=lambda step: lr_at(chosen.schedule, base, step, loader.steps_per_epoch),
            evaluate=partial(after_epoch, chosen, scene),
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
                final(run, chosen, scene, loop)
        finally:
            if loop.monitor:
                loop.monitor.close()
    return finished


def _sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _newest(run: Path, here: World) -> Saved | None:
    """The newest whole checkpoint, as rank 0 finds it: each file is read once, and all ranks take the same."""

    def report(damage: str) -> None:
        print(f"kilobatch: warning: {damage}", file=sys.stderr, flush=True)

    found: list[Path | None] = [newest(run / "checkpoints", report) if here.rank == 0 else None]
    if here.size > 1:
        dist.broadcast_object_list(found, src=0)
    return open_saved(found[0], verify=False) if found[0] else None


if __name__ == "__main__":
    main()
