"""Option types that all papers share, and constraints between options. Loads no torch."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, get_args, runtime_checkable

from pydantic import Field

# Sums are fp32 in each. tf32 is fp32 where there are no tensor cores. Exponentials, logarithms, positives and gradients
# are fp32 (fp64 for fp64 inputs, which are computed with as they are).
Operands = Literal["fp32", "tf32", "bf16", "fp16"]

# The largest absolute exponent x at which e^x can be summed in fp32 without first subtracting the maximum: e^40, and
# its sum over any batch or queue, are far inside the range of fp32.
LARGEST_EXPONENT = 40.0

Reference = Annotated[
    str,
    Field(min_length=1, description="a run (its folder, or its name under runs/), a checkpoint, or an exported file"),
]

WeightsReference = Annotated[
    str,
    Field(
        min_length=1,
        description="a run, a checkpoint, an exported file, or a checkpoint of another package",
    ),
]

TeacherPrecision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class OptionContext:
    """What an option is validated against: the method's other options (by attribute), the encoder's, the number of
    workers, engine.chunks (1 where that is auto), and the global batch."""

    method: Any
    encoder: Any
    workers: int
    chunks: int
    batch: int


@runtime_checkable
class Constraint(Protocol):
    """A constraint that an option's type carries, as in `shuffle: Annotated[bool, NeedsLocalNorm()]`.

    A group of options may carry its own: a model with the method `check(self, context)`, as QueueOptions has.
    """

    def check(self, value: Any, context: OptionContext) -> None:
        """Raises UserError, which names what has to change."""
        ...


def is_reference(kind: Any) -> bool:
    """Whether an option of this type names a run or a file, or several of them."""
    return bool({Reference, WeightsReference} & {kind, *get_args(kind)})
