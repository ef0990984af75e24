"""Trains the toy method of the whole protocol by the real loader, loop and engine, and kills it where a test says."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kilobatch.data.loading.loader import Loader, LoaderWorker, PlainLoader
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.convert import convert
from kilobatch.data.views.options import Crop, Views
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts
from kilobatch.methods.networks.options import Mode
from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.evaluate.features import Images
from kilobatch.trainer.loop import Loop
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.optim.schedules import StepRates
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.training_features import TrainingFeatures
from tests.helpers.protocol_toy import CLASSES, SAMPLES, ProtocolToy, fields, labels

IMAGES, EPOCHS, PER_EPOCH = 3 * SAMPLES, 3, 3
STEPS = EPOCHS * PER_EPOCH
STEP = 5  # the one that is killed: the checkpoint before it is of step 4, within an epoch
CPU = torch.device("cpu")
VIEWS = (Views(size=12), Views(count=3, size=8, crop=Crop(scale=(0.05, 0.3))))
FEATURES = 8  # images in a batch of the hook's


class Killed(Exception):
    """Raised on every rank in place of a signal that kills."""


@dataclass(frozen=True)
class Case:
    """How the toy is trained. keep is 0, so that each chunk is embedded twice."""

    zero: int
    chunks: int = 1
    norm: Mode = "global"


# object, function, which call of it in step STEP or in the last epoch, whether it is killed after that call
Point = tuple[str, str, int, bool]


def points(case: Case, ranks: int) -> dict[str, Point]:
    """Every phase of an epoch and a step, by name."""
    chunks = case.chunks
    embeds = 2 * chunks if chunks > 1 else 1
    rounds = -(-IMAGES // ranks // FEATURES) + 1
    return {
        "before the hook": ("method", "before_epoch", EPOCHS, False),
        "in the hook of an epoch whose checkpoint is older": ("features", "_agree", rounds + 2, False),
        "in the hook": ("features", "_agree", (EPOCHS - 1) * rounds + 2, False),
        "after the hook": ("method", "before_epoch", EPOCHS, True),
        "at the order": ("method", "epoch_order", EPOCHS, False),
        "arranging": ("method", "arrange", STEP + 1, False),
        "in a target": ("method", "target", STEP * chunks + chunks, False),
        "in an embed": ("method", "embed", STEP * embeds + 1, True),
        "in the last embed": ("method", "embed", (STEP + 1) * embeds, False),
        "in the loss": ("method", "loss", STEP + 1, True),
        "before the last backward": ("engine", "backward", (STEP + 1) * chunks, False),
        "checking": ("engine", "finite", STEP + 1, True),
        "before the optimizer": ("engine", "step", STEP + 1, False),
        "after the optimizer": ("engine", "step", STEP + 1, True),
        "before the update": ("method", "update", STEP + 1, False),
        "after the update": ("method", "update", STEP + 1, True),
        "before a checkpoint": ("checkpoints", "save", 3, False),
        "after a checkpoint": ("checkpoints", "save", 3, True),
    }


def write_beton(folder: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 16, 16, 3), dtype=np.uint8)
    tokens = {name: x.numpy() for name, x in fields(IMAGES).items()}
    source = Arrays(images, labels(IMAGES).numpy(), [str(c) for c in range(CLASSES)], tokens)
    convert(source, folder / "toy.beton", progress=False)
    return folder / "toy.beton"


def train(
    folder: Path, beton: Path, case: Case, killed_at: Point | None = None, killed_by: Callable[[], None] | None = None
) -> dict[str, Tensor]:
    """Trains from the newest checkpoint on, if there is one, to the end. Returns everything that the last checkpoint
    holds. Raises Killed where it is killed; killed_by: does so instead."""
    for seed in (torch.manual_seed, np.random.seed, random.seed):  # checkpoints hold the states of all three
        seed(0)
    rank, world = collectives.rank(), collectives.world_size()
    method = ProtocolToy(case.norm)
    method.prepare(DataFacts(IMAGES, CLASSES, (SAMPLES,) * CLASSES))
    section: dict[str, Any] = {"name": "lars", "lr": 0.1, "weight_decay": 0.01, "trust_coefficient": 0.02}
    optimizer = build_optimizer(OptimizerOptions.model_validate(section), method, SAMPLES)
    options = EngineOptions(zero=case.zero, chunks=case.chunks, keep=0)  # pyright: ignore[reportArgumentType]
    engine = Engine(method, optimizer, options, CPU, SAMPLES // world)
    worker = LoaderWorker(rank, world, 1, CPU)

    def order(epoch: int) -> np.ndarray | None:
        found = method.epoch_order(epoch)
        return None if found is None else found.numpy()

    def clean(size: int | None) -> Images:
        return PlainLoader(beton, size or 12, VIEWS[0].mean, VIEWS[0].std, worker, batch=FEATURES)

    loading = Loader(beton, VIEWS, worker, batch=SAMPLES, seed=3, order=order, fields=("tokens",))
    saving = Checkpoints(folder, CheckpointOptions(every_steps=2, every_minutes=None, keep_last=9), rank, world)
    with loading as loader, saving as checkpoints:
        features = TrainingFeatures(engine, clean, lambda: False)
        parts = {"method": method, "engine": engine, "features": features, "checkpoints": checkpoints}
        if killed_at:
            of, name, call, after = killed_at
            kill(parts[of], name, call, after, killed_by or _raise)
        loop = toy_run(engine, loader, checkpoints, features)
        saved = list_checkpoints(folder)
        assert loop.run(loop.restore(open_saved(max(saved.values()))) if saved else 0)
    return contents(folder)


def toy_run(engine: Engine, loader: Loader, checkpoints: Checkpoints, features: TrainingFeatures) -> Loop:
    facts: dict[str, Any] = {"recipe": {}, "images": IMAGES, "classes": ["a"], "images_sha256": "", "data_sha256": ""}
    return Loop(
        engine=engine,
        loader=loader,
        views=VIEWS[0],
        checkpoints=checkpoints,
        epochs=EPOCHS,
        rates=lambda step: StepRates(0.1 * (1 - step / STEPS), 0.01 * (1 + step)),
        evaluate=lambda epoch: {},
        stop_requested=lambda: False,
        monitor=None,
        log_every=1,
        features=features,
        **facts,
    )


def kill(target: object, name: str, call: int, after: bool, by: Callable[[], None]) -> None:
    """Has the function of this name end the training at its call number `call`, from 1, before or after its work."""
    inner, calls = getattr(target, name), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            by()
        result = inner(*args, **options)
        if calls == call and after:
            by()
        return result

    setattr(target, name, counted)


def _raise() -> None:
    raise Killed


def contents(folder: Path) -> dict[str, Tensor]:
    """All that the newest checkpoint holds: parameters, buffers, the optimizer's state whole, and each rank's own."""
    saved = open_saved(max(list_checkpoints(folder).values()))
    found = {name: saved.whole(name) for name in saved.names()}
    return found | {
        f"{name} of {rank}": saved.own(name, rank) for name in saved.own_names() for rank in range(saved.world)
    }


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """The names of the tensors that are not the same to the bit."""
    assert one.keys() == other.keys()
    return [name for name, x in one.items() if not torch.equal(x, other[name])]


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor], names: Sequence[str]) -> float:
    """Of all tensors, relative to the tensor's norm."""
    return max(((one[n] - other[n]).double().norm() / other[n].double().norm().clamp(min=1e-3)).item() for n in names)
