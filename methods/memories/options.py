"""What a recipe may ask of a queue, and what that costs. Without torch, so that a recipe is validated without it."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kilobatch.data.errors import Refusal
from kilobatch.methods.options import LARGEST_EXPONENT, Beside

SHARDED_FROM = 262_144  # keys; below, a replicated queue is small beside an encoder: 134 MB at 128 dimensions in fp32
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

    def check(self, batch: int) -> None:
        """Raises Refusal where the queue cannot hold the keys of one step. batch: keys that all ranks make in it."""
        if self.length < batch:
            raise Refusal(
                f"method.queue.length {self.length} is less than the {batch} keys of one global batch, so that some "
                f"would be gone before they are used; use {batch} or more, or a smaller data.batch"
            )


class OfTheQueue:
    def fits(self, value: int, beside: Beside) -> None:
        refuse_harder(value, beside.method.queue)


Hard = Annotated[int, Field(ge=2), OfTheQueue()]  # how many of a queue's keys are the hardest


def refuse_harder(hard: int, queue: QueueOptions) -> None:
    """Raises Refusal where a queue has fewer keys than are to be the hardest."""
    if hard > queue.length:
        raise Refusal(f"method.hard {hard} is more than the {queue.length} keys of method.queue.length; use fewer")


def share(length: int, rank: int, ranks: int) -> int:
    """Keys that a rank holds of a sharded queue: the remainder is spread over the first ranks."""
    return length // ranks + (rank < length % ranks)


def held(options: QueueOptions, dim: int, ranks: int) -> int:
    """Bytes of keys that the rank with most of them holds."""
    keys = share(options.length, 0, ranks) if options.sharded else options.length
    return keys * dim * BYTES[options.dtype]


def sent(options: QueueOptions, dim: int, ranks: int, queries: int, temperature: float) -> int:
    """Bytes that a rank sends in one step of `queries` queries and as many keys of its own, in rings:

    sharded: (W - 1) n D to gather queries, (W - 1) n (D + 1) to scatter their sums, in fp32, and no key; with a
    temperature under 1/40, 2 (W - 1) n more for their maxima. replicated: (W - 1) n D to gather keys, as stored.
    """
    others = (ranks - 1) * queries
    if not options.sharded:
        return others * dim * BYTES[options.dtype]
    return others * (2 * dim + 1 + (2 if 1 / temperature > LARGEST_EXPONENT else 0)) * 4
