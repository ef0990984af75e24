"""Parameters that are trained otherwise than the rest: at another rate, with another decay, later, or never."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ParameterGroup:
    """How the parameters below a prefix are updated, as an exception from what a recipe says of all.

    prefix: of names in named_parameters(), in whole parts: "head" has head.weight and not header.weight; "": all. lr:
    their share of the schedule's rate; schedule: False: of the base rate instead, throughout. decay: times
    optimizer.weight_decay; None: 1, but 0 for norms and biases where optimizer.decay_norms is false. adapt: whether
    LARS and LAMB step by a trust ratio; None: those with more than one dimension. from_epoch: before it they are not
    updated in any way, and neither momentum nor a step count has begun; inf: they are frozen.
    """

    prefix: str
    lr: float = 1.0
    schedule: bool = True
    decay: float | None = None
    adapt: bool | None = None
    from_epoch: float = 0.0

    def holds(self, name: str) -> bool:
        """Whether the parameter of this name is below the prefix."""
        return self.prefix in ("", name) or name.startswith(f"{self.prefix}.")


REST = ParameterGroup("")


def rule_of(name: str, exceptions: Sequence[ParameterGroup]) -> ParameterGroup:
    """The first exception that holds the parameter of this name; REST where none does."""
    return next((group for group in exceptions if group.holds(name)), REST)
