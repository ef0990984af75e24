"""Computes a rank's bytes of weights, gradients and optimizer state under each ZeRO stage. Loads no torch.

The formula counts what DeepSpeed 0.19.8 allocates as trainer/engine.py configures it: fp32 throughout, no overlap.
`python -m benchmarks.zero_memory --check` compares it with the resident memory of two ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FP32 = 4
ALL_REDUCE = 500_000_000  # gradients that stage 0 flattens at once
BUCKET = 1 << 25  # gradients that stages 1 and 2 average at once: 128 MiB


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes of one rank.

    parameters: the trainable ones, whole at every stage; masters: ZeRO's copy of this rank's share, which it makes of
    fp32 parameters as well; moments: the optimizer's state; gradients: between backward and step; averaging: the
    largest additional memory while gradients are averaged, at stage 2 in the backward, else in the step; updating: the
    largest additional memory of the update.
    """

    parameters: int
    masters: int
    moments: int
    gradients: int
    averaging: int
    updating: int

    @property
    def standing(self) -> int:
        """Bytes held from step to step."""
        return self.parameters + self.masters + self.moments

    @property
    def peak(self) -> int:
        """The largest sum of these at one time, without activations."""
        return self.standing + self.gradients + max(self.averaging, self.updating)


def zero_memory(
    groups: Sequence[int], zero: int, ranks: int, *, moments: int = 1, chunks: int = 1, bucket: int = BUCKET
) -> ZeroMemory:
    """The bytes of one rank.

    groups: elements of each parameter group; moments: the optimizer's numbers for each element, 1 in LARS and SGD, 2 in
    AdamW; chunks: backwards in a step. At stage 2 a rank keeps whole gradients of the parameters at the two ends of its
    share, at most two of each group; the part of them beyond the share is not counted.
    """
    trained = sum(groups)
    if zero == 0:
        return ZeroMemory(
            FP32 * trained,
            0,
            FP32 * moments * trained,
            FP32 * trained,
            averaging=FP32 * min(trained, ALL_REDUCE) if ranks > 1 else 0,
            updating=FP32 * max(groups),
        )
    unit = 2 * ranks  # DeepSpeed aligns each group to it
    padded = [-(-numel // unit) * unit for numel in groups]
    share, largest = sum(padded) // ranks, max(padded) // ranks
    sent = min(bucket, trained)
    update = 2 * largest  # a group's gradients flattened, and its updates
    if zero == 1:
        return ZeroMemory(
            FP32 * sum(padded),
            FP32 * share,
            FP32 * moments * share,
            FP32 * trained,
            averaging=FP32 * sent,
            updating=FP32 * max(0, update - trained),  # gradients of the other ranks' shares are freed before
        )
    return ZeroMemory(
        FP32 * sum(padded),
        FP32 * share,
        FP32 * moments * share,
        FP32 * share,
        averaging=FP32 * (bucket + sent + (share if chunks > 1 else 0)),
        updating=FP32 * update,
    )
