"""A training loop over batches in memory, in the current process group."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

from kilobatch.data.batch import Batch
from kilobatch.data.loading.loader import Loader
from kilobatch.data.views.options import Views
from kilobatch.methods.method import EpochFeatures
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.loop import Loop
from kilobatch.trainer.optim.schedules import StepRates
from tests.helpers.toy_method import own_batch

PER_EPOCH = 3


@dataclass
class Steps:
    """Three batches an epoch; `poisoned`: the step whose images are no numbers; taken: the steps so far."""

    poisoned: int = -1
    taken: list[int] = field(default_factory=list)
    steps_per_epoch: int = PER_EPOCH

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for step in range(epoch * PER_EPOCH + first_step, (epoch + 1) * PER_EPOCH):
            self.taken.append(step)
            batch = own_batch(step)
            if step == self.poisoned:
                batch.views[0][:] = float("nan")
            yield batch


def toy_loop(
    engine: Engine,
    checkpoints: Checkpoints,
    steps: Steps,
    epochs: int,
    stop_requested: Callable[[], bool],
    features: EpochFeatures | None = None,
) -> Loop:
    return Loop(
        engine=engine,
        loader=cast(Loader, steps),
        views=Views(size=8),
        checkpoints=checkpoints,
        epochs=epochs,
        rates=lambda step: StepRates(0.01),
        evaluate=lambda epoch: {},
        stop_requested=stop_requested,
        monitor=None,
        log_every=1,
        recipe={},
        images=0,
        classes=["a"],
        images_sha256="",
        data_sha256="",
        features=features,
    )
