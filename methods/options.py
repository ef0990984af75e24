"""Option types that all papers share, and what options are validated against. Loads no torch."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field

# Sums are fp32 in each. tf32 is fp32 where there are no tensor cores. Exponentials, logarithms, positives and gradients
# are fp32 (fp64 for fp64 inputs, which are computed with as they are).
Operands = Literal["fp32", "tf32", "bf16", "fp16"]

LARGEST_EXPONENT = 40.0  # exp(+-40), and its sum over any batch or queue, are far inside fp32

Reference = Annotated[
    str,
    Field(min_length=1, description="a run (its folder, or its name under runs/), a checkpoint, or an exported file"),
]

TeacherPrecision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Beside:
    """What an option stands beside. method: the options of its section, an attribute each; chunks: 1 where the machine
    chooses."""

    method: Any
    encoder: Any
    workers: int
    chunks: int


@runtime_checkable
class Fitting(Protocol):
    """Stands in an option's type: `shuffle: Annotated[bool, OverLocalNorms()]`."""

    def fits(self, value: Any, beside: Beside) -> None:
        """Raises Refusal, which names what has to change."""
        ...
