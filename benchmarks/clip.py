"""CLIP's loss, forward and backward on one CPU thread: time and peak memory of ours, of ours with a learnt temperature,
of a plain version.

    python -m benchmarks.clip                  # 4096 pairs, 128 dimensions; about a minute
    python -m benchmarks.clip 4096 --rounds 7

benchmarks/turns.py says how it is measured. Our tiles need 8 N^2 D floating-point operations for N pairs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import arguments, measure, take_turns, tell

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
    from methods.losses import clip_loss

    temperature = torch.tensor(TEMPERATURE, requires_grad=True) if name == "learnt" else TEMPERATURE
    return lambda z1, z2: clip_loss(z1, z2, temperature)


def views(pairs: int) -> tuple[Tensor, Tensor]:
    return torch.randn(pairs, DIM, requires_grad=True), torch.randn(pairs, DIM, requires_grad=True)


def main() -> None:
    options = arguments(__doc__, "pairs", [4096])
    if options.measure:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        loss = loss_of(options.measure)
        loss(*views(512)).backward()
        z1, z2 = views(options.pairs[0])
        tell(measure(lambda: loss(z1, z2)))
        return
    print("pairs | seconds, / ours, MiB: ours | learnt | plain | GEMM share")
    for pairs in options.pairs:
        turns = take_turns("benchmarks.clip", pairs, options.rounds, NAMES)
        best = {name: min(turn.seconds for turn in turns[name]) for name in NAMES}
        mib = {name: max(turn.bytes for turn in turns[name]) / 2**20 for name in NAMES}
        each = [f"{best[name]:.3f} {best[name] / best['ours']:.1f}x {mib[name]:.0f}" for name in NAMES]
        gemm = max(turn.gemm for name in NAMES for turn in turns[name])
        print(f"{pairs:5} | {' | '.join(each)} | {8 * pairs**2 * DIM / best['ours'] / gemm:.0%}", flush=True)


if __name__ == "__main__":
    main()
