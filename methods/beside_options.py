"""An option that goes with some values of others only. Without torch, so that a recipe is validated without it."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from kilobatch.methods.encoder_options import EncoderOptions


@dataclass(frozen=True)
class Beside:
    """What an option stands beside. method: the options of its section, an attribute each; chunks: 1 where the machine
    chooses."""

    method: Any
    encoder: EncoderOptions
    workers: int
    chunks: int


@runtime_checkable
class Fitting(Protocol):
    """Stands in an option's type: `shuffle: Annotated[bool, OverLocalNorms()]`."""

    def fits(self, value: Any, beside: Beside) -> None:
        """Raises Refusal, which names what has to change."""
        ...
