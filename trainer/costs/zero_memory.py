"""What a rank holds of weights, gradients and optimizer under each ZeRO stage, in bytes; numbers alone, no torch.

Counted from what our configuration of DeepSpeed 0.19.8 allocates: fp32 throughout, no overlap. It is held against the
resident memory of two ranks by `python -m benchmarks.zero_memory --check`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

FP32 = 4
ALL_REDUCE = 500_000_000  # gradients that stage 0 flattens at once
BUCKET = 1 << 25  # gradients that stages 1 and 2 average at once: 128 MiB


@dataclass(frozen=True)
class ZeroMemory:
    """Bytes of one rank.

    parameters: the trainable ones, whole at every stage; masters: ZeRO's copy of this rank's share, which it has for
    fp32 parameters, too; moments: the optimizer's state; gradients: after the backward, before the step; averaging:
    the most that there is beside gradients while they are averaged, at stage 2 in the backward, else in the step;
    updating: the same for the update.
    """

    parameters: int
    masters: int
    moments: int
    gradients: int
    averaging: int
    updating: int

    @property
    def standing(self) -> int:
        """From step to step."""
        return self.parameters + self.masters + self.moments

    @property
    def peak(self) -> int:
        """The most of all this at once, activations left out."""
        return self.standing + self.gradients + max(self.averaging, self.updating)


def zero_memory(
    groups: Sequence[int], zero: int, ranks: int, *, moments: int = 1, chunks: int = 1, bucket: int = BUCKET
) -> ZeroMemory:
    """groups: elements of each parameter group; moments: of the optimizer, for each element: LARS and SGD have 1, AdamW
    2. chunks: backwards in a step. At stage 2 a rank keeps whole gradients of the parameters that its share cuts, two
    of each group at most: what is beyond the share is not counted here."""
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
            updating=FP32 * max(0, update - trained),  # those that other ranks update with are gone by then
        )
    return ZeroMemory(
        FP32 * sum(padded),
        FP32 * share,
        FP32 * moments * share,
        FP32 * share,
        averaging=FP32 * (bucket + sent + (share if chunks > 1 else 0)),
        updating=FP32 * update,
    )
