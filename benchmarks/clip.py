"""CLIP's loss, forward and backward on one CPU thread: time and peak memory of this project's loss, of the same with a
learnt temperature, and of a plain version.

    python -m benchmarks.clip                  # 4096 pairs, 128 dimensions; about a minute
    python -m benchmarks.clip 4096 --rounds 7

benchmarks/turns.py says how it is measured. Our tiles need 8 N^2 D floating-point operations for N pairs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import arguments, largest, measure_pairs, quickest, share, take_turns

DIM, TEMPERATURE = 128, 0.07
NAMES = ("ours", "learnt", "plain")


def plain(z1: Tensor, z2: Tensor) -> Tensor:
    """Radford et al. 2021, figure 3."""
    s = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / TEMPERATURE
    labels = torch.arange(len(s))
    return (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "plain":
        return plain
    from kilobatch.methods.losses.contrastive import clip_loss

    temperature = torch.tensor(TEMPERATURE, requires_grad=True) if name == "learnt" else TEMPERATURE
    return lambda z1, z2: clip_loss(z1, z2, temperature)


def main() -> None:
    options = arguments(__doc__, "pairs", [4096])
    if options.measure:
        measure_pairs(loss_of(options.measure), options.pairs[0], DIM)
        return
    print("pairs | seconds, / ours, MiB: ours | learnt | plain | GEMM share")
    for pairs in options.pairs:
        turns = take_turns("benchmarks.clip", pairs, options.rounds, NAMES)
        ours = quickest(turns["ours"])
        cells = [
            f"{quickest(turns[name]):.3f} {quickest(turns[name]) / ours:.1f}x {largest(turns[name]):.0f}"
            for name in NAMES
        ]
        print(f"{pairs:5} | {' | '.join(cells)} | {share(turns['ours'], 8 * pairs**2 * DIM):.0%}", flush=True)


if __name__ == "__main__":
    main()
