"""The training loop: steps, logs, evaluations and checkpoints, from any checkpoint on and up to a signal."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kilobatch.data.batch import Batch, Clock
from kilobatch.data.errors import UserError
from kilobatch.data.loading.loader import Loader, input_images
from kilobatch.data.views.options import Views
from kilobatch.methods import collectives
from kilobatch.methods.method import EpochFeatures, Method
from kilobatch.methods.networks import batch_norm
from kilobatch.trainer.checkpoint import soundness
from kilobatch.trainer.checkpoint.reader import Saved
from kilobatch.trainer.checkpoint.rng_state import restore_rng, rng_pieces
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.divergence import LossHistory
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.monitor.embedding_metrics import measure
from kilobatch.trainer.monitor.monitor import Monitor
from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.optim.schedules import StepRates
from kilobatch.trainer.ranks.heartbeat import heartbeat
from kilobatch.trainer.step import NonFinite, StepOutput, check_finite, forward_backward
from kilobatch.trainer.training_features import Stopped


@dataclass
class Loop:
    """One training. Every rank has a Loop, and all of them take the same steps.

    rates: of a step; evaluate: called on all ranks with the number of epochs that have ended, returns the
    values to log; stop_requested: true once this process has received a stop signal; monitor: rank 0's, None on the
    others; recipe: stored in checkpoints, so that an export needs nothing else; images, classes: how many images the
    training data have, and the names of their classes, stored likewise; images_sha256: of the training images, so that
    an evaluation notices others; data_sha256: of the images and of which of them have labels, so that a resume notices
    other data; former_data: likewise, of those that a user has replaced knowingly; features: what a method asks before
    an epoch, None: it may not; done: the number of steps that are done; losses: of the last of them.
    """

    engine: Engine
    loader: Loader
    views: Views
    checkpoints: Checkpoints
    epochs: int
    rates: Callable[[int], StepRates]
    evaluate: Callable[[int], dict[str, float]]
    stop_requested: Callable[[], bool]
    monitor: Monitor | None
    log_every: int
    recipe: dict[str, Any]
    images: int
    classes: list[str]
    images_sha256: str
    data_sha256: str
    former_data: frozenset[str] = frozenset()
    features: EpochFeatures | None = None
    done: int = 0
    losses: LossHistory = field(default_factory=LossHistory)

    @property
    def steps(self) -> int:
        return self.epochs * self.loader.steps_per_epoch

    def run(self, step: int) -> bool:
        """Trains on from step number `step`. Returns True once all steps are done and saved, False after a stop signal.

        A step at or past the end, as after a resume with fewer epochs, ends it at once. The evaluation of the last
        epoch is left to the caller, since a training that is saved has finished whatever an evaluator does. A signal on
        any rank makes all ranks save after the same step and return. Raises NonFinite before an update that would
        spoil the weights.
        """
        per_epoch = self.loader.steps_per_epoch
        self.done = step
        while step < self.steps:
            epoch, within = divmod(step, per_epoch)
            if step and within == 0:
                self._end_epoch(epoch, step)
            if within == 0 and not self._begin_epoch(epoch):
                if step:  # else there is nothing to save: a run without a checkpoint starts here anyway
                    self._save(step, wait=True)
                return False
            batches = self.loader.epoch(epoch, within)
            for _ in range(within, per_epoch):
                began = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - began
                # One heartbeat before the step as well: a rank whose data do not come has then sent one fewer than the
                # ranks that wait for it in the step.
                heartbeat(in_step=True)
                stop = self._step(step, batch, waited)
                heartbeat(in_step=True)
                step += 1
                self.done = step
                if stop and step < self.steps:
                    self._save(step, wait=True)
                    return False
            assert next(batches, None) is None, "the loader yields steps_per_epoch batches"
        self._save(step, wait=True)
        return True

    def _begin_epoch(self, epoch: int) -> bool:
        """Has the method make what holds for the epoch. False, with nothing changed, where a rank was told to stop."""
        method = self.engine.method
        if type(method).before_epoch is Method.before_epoch:
            return True
        assert self.features, "the method makes something of them"
        try:
            with torch.no_grad():
                method.before_epoch(epoch, self.features)
        except Stopped:
            return False
        if self.monitor:
            self.monitor.begin_interval()  # so that its time is not counted as training
        return True

    def _step(self, step: int, batch: Batch, waited: float) -> bool:
        """One update, its log and its checkpoint. Returns True where a rank has received a stop signal."""
        if step == 0 and self.monitor and batch.views:
            self.monitor.images(batch.views, self.views.mean, self.views.std)
        batch = batch.replaced(clock=Clock(step, self.steps, self.loader.steps_per_epoch))
        outcome = forward_backward(self.engine, batch)
        flags = self.stop_requested(), self.checkpoints.due_by_clock()
        try:
            stop, due = check_finite(self.engine, outcome, step, flags)
        except NonFinite as failure:
            failure.losses = self.losses
            raise
        self.losses.note(step, outcome.loss)
        rates = self.rates(step)
        self.engine.step(*rates)
        batch_norm.commit(self.engine.method)
        self.engine.method.update(outcome.z, outcome.t, outcome.batch)

        done = step + 1
        if self.monitor:
            self.monitor.count(len(batch) * collectives.world_size(), waited)
        if done % self.log_every == 0 or done in (1, self.steps):
            self._log(done, outcome, rates)
        if self.monitor:
            self.monitor.progress(done)
        if (due or self.checkpoints.due_by_steps(done)) and not stop and done < self.steps:
            self._save(done, wait=False)
        return stop

    def _log(self, done: int, outcome: StepOutput, rates: StepRates) -> None:
        loss = collectives.mean(outcome.loss.double())
        if not self.monitor:
            return
        values = {"train/loss": loss.item(), "train/lr": rates.lr, "train/epoch": done / self.loader.steps_per_epoch}
        if rates.decay is not None:  # it goes by a schedule
            values["train/weight_decay"] = rates.decay
        scalars = self.engine.scalars() | self.engine.method.scalars()
        values |= {f"train/{name}": value for name, value in scalars.items()}
        z = self.engine.method.measured(outcome.z, outcome.t)
        if z is not None and min(z.shape[:2]) > 1:  # two samples and two views of each: negatives and positives
            values |= measure(z)
        if isinstance(self.engine.optimizer, LARS):
            values |= _on_host({f"trust_ratio/{k}": v for k, v in self.engine.optimizer.trust_ratios().items()})
        self.monitor.log(done, values | self.monitor.rates())

    def _end_epoch(self, epoch: int, step: int) -> None:
        # run() calls this also right after a resume at this step: the run may have been killed before the values were
        # written.
        values = self.evaluate(epoch)
        if values and self.monitor:
            self.monitor.log(step, {"epoch": epoch, **values})
            self.monitor.begin_interval()  # so that the evaluation's time is not counted as training

    def _save(self, step: int, wait: bool) -> None:
        per_epoch = self.loader.steps_per_epoch
        meta: dict[str, Any] = {"step": step, "steps_per_epoch": per_epoch, "epoch": step // per_epoch}
        meta |= {"recipe": self.recipe, "images": self.images, "classes": len(self.classes)}
        meta |= {"class_names": self.classes, "input": input_images(self.views)}
        meta |= {"kept": self.engine.method.kept}
        meta |= {"images_sha256": self.images_sha256, "data_sha256": self.data_sha256}
        pieces = self.engine.pieces()
        meta |= {soundness.KEY: self.losses.soundness(step, pieces).model_dump()}
        self.checkpoints.save(step, pieces | rng_pieces(), meta, wait)

    def restore(self, saved: Saved) -> int:
        """Loads a checkpoint into engine and random generators. Returns its step.

        On as many ranks as wrote it, training goes on bit for bit as the uninterrupted run does. On another number of
        ranks the batches are the same, but the generators are seeded anew from the step, as their states are by rank.
        Raises UserError where the training data have changed.
        """
        step, per_epoch = saved.meta["step"], saved.meta["steps_per_epoch"]
        if per_epoch != self.loader.steps_per_epoch:
            raise UserError(
                f"the checkpoint's epochs have {per_epoch} steps, this run's {self.loader.steps_per_epoch}: "
                "data.train or data.batch has changed; resume with what it was written with"
            )
        if saved.meta["data_sha256"] not in (self.data_sha256, *self.former_data):
            raise UserError(
                f"{saved.folder} was trained on other images or labels than data.train holds now (SHA-256 "
                f"{saved.meta['data_sha256'][:12]}…, now {self.data_sha256[:12]}…); put the old ones back, or start "
                "a new run"
            )
        self.engine.restore(saved)
        self.checkpoints.resumed(step)
        if saved.world == collectives.world_size():
            restore_rng(saved, collectives.rank())
        else:
            torch.manual_seed(torch.initial_seed() + step * collectives.world_size())
        return step


def _on_host(values: dict[str, Tensor]) -> dict[str, float]:
    """The values as floats, by one transfer from the device."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True)) if values else {}
