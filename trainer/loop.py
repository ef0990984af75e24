"""The loop: batches in, a trained encoder out, through any signal and any kill."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.errors import Refusal
from kilobatch.data.loading.loader import Loader
from kilobatch.data.views.options import Views
from kilobatch.methods import collectives as across
from kilobatch.methods.networks import batch_norm as norm
from kilobatch.trainer.checkpoint.reader import Saved
from kilobatch.trainer.checkpoint.rng_state import restore_rng, rng_pieces
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.monitor.embedding_metrics import collapse, measure
from kilobatch.trainer.monitor.monitor import Monitor
from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.ranks.heartbeat import beat
from kilobatch.trainer.step import Outcome, check_finite, forward_backward


@dataclass
class Loop:
    """One training. Every rank has one, and all of them do the same steps.

    learning_rate: of a step; evaluate: of the epochs that have ended, run on all ranks together, returns what to log;
    asked_to_stop: whether this process was sent a signal; monitor: rank 0's, None on the others; recipe: kept in
    checkpoints, so that an export needs nothing else; images, classes: how many the training data have, likewise;
    data_sha256: of the training images and which of them have labels, so that a resume notices others.
    """

    engine: Engine
    loader: Loader
    views: Views
    checkpoints: Checkpoints
    epochs: int
    learning_rate: Callable[[int], float]
    evaluate: Callable[[int], dict[str, float]]
    asked_to_stop: Callable[[], bool]
    monitor: Monitor | None
    log_every: int
    recipe: dict[str, Any]
    images: int
    classes: int
    data_sha256: str

    @property
    def steps(self) -> int:
        return self.epochs * self.loader.steps_per_epoch

    def run(self, step: int) -> bool:
        """Goes on after `step` steps. Returns True at the end, False where a signal on any rank made all ranks save
        after the same step and leave. Raises NonFinite before an update that would spoil the weights."""
        per_epoch = self.loader.steps_per_epoch
        while True:
            epoch, within = divmod(step, per_epoch)
            if step and within == 0:
                self._end_epoch(epoch, step)
            if step == self.steps:
                self._save(step, wait=True)
                return True
            batches = self.loader.epoch(epoch, within)
            for _ in range(within, per_epoch):
                began = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - began
                beat(pace=True)  # a rank whose data do not come is then behind those that wait for it in the step
                stop = self._step(step, batch, waited)
                beat(pace=True)
                step += 1
                if stop and step < self.steps:
                    self._save(step, wait=True)
                    return False
            assert next(batches, None) is None, "the loader yields steps_per_epoch batches"

    def _step(self, step: int, batch: Batch, waited: float) -> bool:
        """One update, its log and its checkpoint. Returns whether to stop."""
        if step == 0 and self.monitor:
            self.monitor.images(batch.views, self.views.mean, self.views.std)
        outcome = forward_backward(self.engine, batch)
        flags = self.asked_to_stop(), self.checkpoints.due_by_clock()
        stop, due = check_finite(self.engine, outcome, step, flags)
        lr = self.learning_rate(step)
        self.engine.step(lr)
        norm.commit(self.engine.method)
        self.engine.method.update(outcome.z, outcome.t, batch, (step + 1) / self.steps)

        done = step + 1
        if self.monitor:
            self.monitor.progress(done, len(batch) * across.size(), waited)
        if done % self.log_every == 0 or done in (1, self.steps):
            self._log(done, outcome, lr)
        if (due or self.checkpoints.due_by_steps(done)) and not stop and done < self.steps:
            self._save(done, wait=False)
        return stop

    def _log(self, done: int, outcome: Outcome, lr: float) -> None:
        loss = across.mean(outcome.loss.double())
        if not self.monitor:
            return
        values = {"train/loss": loss.item(), "train/lr": lr, "train/epoch": done / self.loader.steps_per_epoch}
        scalars = self.engine.scalars() | self.engine.method.scalars()
        values |= {f"train/{name}": value for name, value in scalars.items()}
        z = self.engine.method.measured(outcome.z, outcome.t)
        if z is not None and min(z.shape[:2]) > 1:  # two samples and two views of each: negatives and positives
            values |= measure(z)
            if found := collapse(values):
                self.monitor.warn_once(found)
        if isinstance(self.engine.optimizer, LARS):
            values |= _on_host({f"trust_ratio/{k}": v for k, v in self.engine.optimizer.trust_ratios().items()})
        self.monitor.log(done, values | self.monitor.rates())

    def _end_epoch(self, epoch: int, step: int) -> None:
        # Also right after a resume at this step: the kill may have come before the line was written.
        values = self.evaluate(epoch)
        if values and self.monitor:
            self.monitor.log(step, {"epoch": epoch, **values})
            self.monitor.rates()  # the time of the evaluation is not the training's

    def _save(self, step: int, wait: bool) -> None:
        per_epoch = self.loader.steps_per_epoch
        meta: dict[str, Any] = {"step": step, "steps_per_epoch": per_epoch, "epoch": step // per_epoch}
        meta |= {"recipe": self.recipe, "images": self.images, "classes": self.classes}
        meta["data_sha256"] = self.data_sha256
        self.checkpoints.save(step, self.engine.pieces() | rng_pieces(), meta, wait)

    def restore(self, saved: Saved) -> int:
        """Takes up a checkpoint. Returns its step.

        On as many ranks as wrote it, what follows is the uninterrupted run bit for bit; on another number the batches
        are the same, and the random generators, which have other states there, start anew from the step.
        Raises Refusal where the data are others now.
        """
        step, per_epoch = saved.meta["step"], saved.meta["steps_per_epoch"]
        if per_epoch != self.loader.steps_per_epoch:
            raise Refusal(
                f"the checkpoint's epochs have {per_epoch} steps, this run's {self.loader.steps_per_epoch}: "
                "data.train or data.batch has changed; resume with what it was written with"
            )
        if saved.meta["data_sha256"] != self.data_sha256:
            raise Refusal(
                f"{saved.folder} was trained on other images or labels than data.train holds now (SHA-256 "
                f"{saved.meta['data_sha256'][:12]}…, now {self.data_sha256[:12]}…); put the old ones back, or start "
                "a new run"
            )
        self.engine.restore(saved)
        self.checkpoints.resumed(step)
        if saved.world == across.size():
            restore_rng(saved, across.rank())
        else:
            torch.manual_seed(torch.initial_seed() + step * across.size())
        return step


def _on_host(values: dict[str, Tensor]) -> dict[str, float]:
    """One transfer for all."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}
