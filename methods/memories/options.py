"""Options of a queue (recipe section `method.queue`), and its costs. Loads no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kilobatch.data.errors import UserError
from kilobatch.methods.options import LARGEST_EXPONENT, OptionContext

SHARDED_FROM = 262_144  # keys; fewer are small beside an encoder when replicated: 134 MB at 128 dimensions in fp32
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class QueueOptions(BaseModel):
    """Recipe section `method.queue`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int = Field(default=65_536, ge=1, description="keys that all ranks hold together")
    placement: Literal["sharded", "replicated"] | None = Field(
        default=None,
        description=f"each rank its share of the keys, or all of them; null: sharded from {SHARDED_FROM} keys",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="that keys are stored in; sums are fp32")
    start: Literal["random", "empty"] = Field(
        default="random", description="random unit keys, as MoCo has them, or none: then the queue fills step by step"
    )

    @property
    def sharded(self) -> bool:
        return self.length >= SHARDED_FROM if self.placement is None else self.placement == "sharded"

    def check(self, context: OptionContext) -> None:
        """Raises UserError where the queue cannot hold the keys of one step: those of the global batch."""
        if self.length < context.batch:
            raise UserError(
                f"method.queue.length {self.length} is less than the {context.batch} keys of one global batch, so that "
                f"some would be gone before they are used; use {context.batch} or more, or a smaller data.batch"
            )


class AtMostQueueLength:
    """Constraint of an option that counts keys of method.queue."""

    def check(self, value: int, context: OptionContext) -> None:
        refuse_too_many_hard(value, context.method.queue)


HardCount = Annotated[int, Field(ge=2), AtMostQueueLength()]  # the number of a queue's keys that are the hardest


def refuse_too_many_hard(hard: int, queue: QueueOptions) -> None:
    """Raises UserError if the number of hardest keys is more than the queue holds."""
    if hard > queue.length:
        raise UserError(f"method.hard {hard} is more than the {queue.length} keys of method.queue.length; use fewer")


def share(length: int, rank: int, ranks: int) -> int:
    """The number of keys that a rank holds of a sharded queue; the remainder goes to the first ranks."""
    return length // ranks + (rank < length % ranks)


def bytes_held(options: QueueOptions, dim: int, ranks: int) -> int:
    """Bytes of keys on the rank that holds most of them."""
    keys = share(options.length, 0, ranks) if options.sharded else options.length
    return keys * dim * BYTES[options.dtype]


def bytes_sent(options: QueueOptions, dim: int, ranks: int, queries: int, temperature: float) -> int:
    """Bytes that a rank sends in one step, by ring algorithms. queries: n, its queries, and its keys as well.

    Sharded: (W - 1) n D numbers to gather queries and (W - 1) n (D + 1) to reduce-scatter their sums, in fp32, and no
    key; with a temperature under 1/40, 2 (W - 1) n more for their maxima. Replicated: (W - 1) n D numbers to gather
    keys, in the type that they are stored in.
    """
    others = (ranks - 1) * queries
    if not options.sharded:
        return others * dim * BYTES[options.dtype]
    return others * (2 * dim + 1 + (2 if 1 / temperature > LARGEST_EXPONENT else 0)) * 4
