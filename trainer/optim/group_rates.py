"""Sets the rate and decay of each of an optimizer's groups in every step, and keeps late groups still until then."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from kilobatch.data.batch import START, Clock
from kilobatch.methods.parameter_groups import REST, ParameterGroup
from kilobatch.trainer.optim.parameter_groups import RULE


class GroupRates:
    """The rates of an optimizer's groups, by the ParameterGroup that each has.

    A late group, whose from_epoch is above 0, waits for the first step that begins at or after it. Until then its
    gradients become zero as soon as a backward has added to them: before an average over ranks, a norm or a check sees
    them. So its moments stay zero, and with rate and decay 0 its weights stay as they are. (A rate of 0 alone would let
    the moments fill.) At its first own step the optimizer's state of it is set to zero, step counts included: with a
    count of the steps before, Adam would not correct its moments for their start. So its beginning cannot be moved
    across a checkpoint, which launch/recipes/continuation.py refuses.

    It is made before DeepSpeed takes the optimizer, so that these hooks of gradients run before DeepSpeed's own.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._base = [group["lr"] for group in optimizer.param_groups]
        self._decay = [group["weight_decay"] for group in optimizer.param_groups]
        self._late = [group for group in optimizer.param_groups if _rule(group).from_epoch > 0]
        self._clock = START
        for group in self._late:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(partial(self._drop_gradient, _rule(group)))

    def begin(self, clock: Clock) -> None:
        """Begins a step; called before its backwards. The clock alone decides, so a resumed run does the same."""
        self._clock = clock
        for group in self._late:
            if _starts(_rule(group), clock):
                for p in group["params"]:
                    _clear(self._optimizer.state.get(p, {}))

    def set(self, lr: float, decay: float | None) -> None:
        """Sets the rates of this step. lr: the schedule's; decay: the weight decay, None: as the groups were made."""
        for group, base, own in zip(self._optimizer.param_groups, self._base, self._decay, strict=True):
            rule = _rule(group)
            waits = _waits(rule, self._clock)
            share = own if decay is None or rule.decay is None else decay * rule.decay
            group["lr"] = 0.0 if waits else (lr if rule.schedule else base) * rule.lr
            group["weight_decay"] = 0.0 if waits else share

    @torch.no_grad()
    def _drop_gradient(self, rule: ParameterGroup, p: Tensor) -> None:
        if _waits(rule, self._clock) and p.grad is not None:
            p.grad.zero_()


def _rule(group: dict[str, Any]) -> ParameterGroup:
    """Of a group that parameter_groups() has made; REST of any other."""
    return group.get(RULE, REST)


def _waits(rule: ParameterGroup, clock: Clock) -> bool:
    return clock.epoch < rule.from_epoch


def _starts(rule: ParameterGroup, clock: Clock) -> bool:
    """Whether this step is the first that begins at or after from_epoch."""
    return not _waits(rule, clock) and (clock.step - 1) / clock.per_epoch < rule.from_epoch


def _clear(state: dict[str, Any]) -> None:
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()
