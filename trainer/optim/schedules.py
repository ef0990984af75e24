"""Computes learning rate and weight decay from the step alone, so that a resumed run needs no schedule state."""

from math import cos, pi
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kilobatch.trainer.optim.options import OptimizerOptions, scaled_lr


class ScheduleOptions(BaseModel):
    """Recipe section `schedule`. Epochs may be fractions in the warm-up.

    name: how the learning rate goes on after the warm-up: by a cosine, constant, or falling in steps at the milestones.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    epochs: int = Field(default=100, ge=1, description="how many times the training set is seen")
    warmup_epochs: float = Field(default=10, ge=0, description="epochs of a linear warm-up")
    warmup_from: float = Field(default=0.0, ge=0, le=1, description="share of the base rate that the warm-up begins at")
    name: Literal["cosine", "constant", "steps"] = "cosine"
    final: float = Field(default=0.0, ge=0, le=1, description="share of the base learning rate that the cosine ends at")
    by_epoch: bool = Field(
        default=False, description="whether the rate changes where epochs begin only, as in MoCo's and SimSiam's code"
    )
    milestones: tuple[int, ...] = Field(default=(), description="steps: the epochs after which the rate falls")
    factor: float = Field(default=0.1, gt=0, lt=1, description="steps: what the rate is multiplied by at each")

    @model_validator(mode="after")
    def _warm_up_fits(self) -> "ScheduleOptions":
        if self.warmup_epochs > self.epochs:
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs:g}) is more than epochs ({self.epochs}); "
                f"use at most {self.epochs}, or 0 for no warm-up"
            )
        return self

    @model_validator(mode="after")
    def _first_epoch_learns(self) -> "ScheduleOptions":
        if self.by_epoch and self.warmup_epochs and not self.warmup_from:
            raise ValueError(
                f"by_epoch true with warmup_epochs {self.warmup_epochs:g} and warmup_from 0: the first epoch's rate "
                "would be 0; use warmup_epochs 0, or warmup_from 0.1, say"
            )
        return self

    @model_validator(mode="after")
    def _milestones_are_epochs(self) -> "ScheduleOptions":
        if (self.name == "steps") != bool(self.milestones):
            raise ValueError(
                "name: steps and milestones go together; give both, such as milestones: [120, 160], or neither"
            )
        if any(not 0 < milestone < self.epochs for milestone in self.milestones):
            raise ValueError(f"milestones {list(self.milestones)} should lie between 0 and epochs ({self.epochs})")
        return self


class StepRates(NamedTuple):
    """Learning rate and weight decay of one step; decay None: that of the optimizer's groups, which never changes."""

    lr: float
    decay: float | None = None


def total_steps(options: ScheduleOptions, steps_per_epoch: int) -> int:
    return options.epochs * steps_per_epoch


def lr_at(options: ScheduleOptions, base: float, step: int, steps_per_epoch: int) -> float:
    """The learning rate of step 0, 1, … total - 1: base·step/warm-up at first, then by a cosine, constant, or falling
    at the milestones. With by_epoch it is that of the epoch's first step.

    Step 0 of a warm-up has the share warmup_from of the base rate. With the default, 0, it is as in
    `model_util.learning_rate_schedule` of google-research/simclr.
    """
    warmup, total = round(options.warmup_epochs * steps_per_epoch), total_steps(options, steps_per_epoch)
    if options.by_epoch:
        step -= step % steps_per_epoch
    if step < warmup:
        return base * step / warmup + options.warmup_from * base * (1 - step / warmup)
    if options.name == "constant":
        return base
    if options.name == "steps":
        return base * options.factor ** sum(step >= milestone * steps_per_epoch for milestone in options.milestones)
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return base * (options.final + (1 - options.final) * (1 + cos(pi * progress)) / 2)


def rates_at(
    schedule: ScheduleOptions, optimizer: OptimizerOptions, global_batch: int, step: int, steps_per_epoch: int
) -> StepRates:
    """Learning rate and weight decay of a step of a recipe's training."""
    lr = lr_at(schedule, scaled_lr(optimizer, global_batch), step, steps_per_epoch)
    return StepRates(lr, decay_at(optimizer, step, total_steps(schedule, steps_per_epoch)))


def decay_at(options: OptimizerOptions, step: int, steps: int) -> float | None:
    """The weight decay of step 0, 1, … steps - 1: from options.weight_decay by half a cosine to final_weight_decay;
    None: it stays what it is.

    As in facebookresearch/dino, utils.cosine_scheduler.
    """
    if (last := options.final_weight_decay) is None:
        return None
    return last + (options.weight_decay - last) * (1 + cos(pi * step / steps)) / 2
