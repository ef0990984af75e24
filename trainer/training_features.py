"""Features of all training samples, for a method that makes something of them before an epoch (Method.before_epoch)."""

from collections.abc import Callable, Generator
from contextlib import closing
from typing import cast

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.evaluate.features import Images, evaluation_mode
from kilobatch.trainer.ranks.heartbeat import heartbeat
from kilobatch.trainer.ranks.phase import phase


class Stopped(Exception):
    """A rank was told to stop while features were computed. Raised on all ranks, in the same round."""


class TrainingFeatures:
    """Computes features as methods.method.EpochFeatures has it, under the engine's autocast.

    images: gives this rank's block of clean training images of a size (None: of the first group of views);
    stop_requested: true once this process has received a stop signal.
    """

    def __init__(
        self, engine: Engine, images: Callable[[int | None], Images], stop_requested: Callable[[], bool]
    ) -> None:
        self._engine, self._images, self._stop_requested = engine, images, stop_requested

    def __call__(self, embed: Callable[[Tensor], Tensor], size: int | None = None) -> tuple[Tensor, Tensor]:
        images, index, rows, done = self._images(size), list[Tensor](), list[Tensor](), 0
        batches = cast(Generator[Batch, None, None], iter(images))
        with closing(batches), evaluation_mode(self._engine.method), torch.no_grad():
            # Blocks may differ by one sample, and so by one batch: every rank asks until none has any more.
            while self._agree(batch := next(batches, None)):
                if batch is not None:
                    with self._engine.autocast():
                        rows.append(embed(batch.views[0][:, 0]).float())
                    index.append(batch.index)
                    done += len(batch) * collectives.world_size()
                    phase("features of the training images", min(done, images.samples), images.samples)
                heartbeat()
        return torch.cat(index), torch.cat(rows)

    def go_on(self, work: str, done: int, total: int) -> None:
        phase(work, done, total)
        heartbeat()
        self._agree(None)

    def _agree(self, batch: Batch | None) -> bool:
        """Whether any rank has a batch left. Raises Stopped, on all of them, where one was told to stop."""
        flags = torch.tensor([int(self._stop_requested()), int(batch is not None)])
        stop, more = self._engine.agree(flags).tolist()
        if stop:
            raise Stopped
        return bool(more)
