"""NT-Xent, forward and backward on one CPU thread: time and peak memory of ours, of a plain version, of lightly's.

    python -m benchmarks.nt_xent                  # 1024, 2048, 4096 and 8192 pairs, 128 dimensions; about 3 minutes
    python -m benchmarks.nt_xent 4096 --rounds 7

benchmarks/turns.py says how it is measured. Our tiles need 4 M^2 D floating-point operations for M = 2 pairs rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import HEADER, arguments, measure, row, take_turns, tell

DIM, TEMPERATURE = 128, 0.1


def plain(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = z @ z.T / temperature
    s = s.masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(s, torch.arange(2 * n).roll(n))


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name == "plain":
        return lambda z1, z2: plain(z1, z2, TEMPERATURE)
    if name == "lightly":
        from lightly.loss import NTXentLoss  # pyright: ignore[reportMissingImports]

        return NTXentLoss(temperature=TEMPERATURE)
    from methods.losses import nt_xent

    return lambda z1, z2: nt_xent(z1, z2, TEMPERATURE)


def views(pairs: int) -> tuple[Tensor, Tensor]:
    return torch.randn(pairs, DIM, requires_grad=True), torch.randn(pairs, DIM, requires_grad=True)


def main() -> None:
    options = arguments(__doc__, "pairs", [1024, 2048, 4096, 8192])
    if options.measure:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        loss = loss_of(options.measure)
        loss(*views(512)).backward()
        z1, z2 = views(options.pairs[0])
        tell(measure(lambda: loss(z1, z2)))
        return
    print(f"pairs | {HEADER}")
    for pairs in options.pairs:
        turns = take_turns("benchmarks.nt_xent", pairs, options.rounds)
        print(f"{pairs:5} | {row(turns, 4 * (2 * pairs) ** 2 * DIM)}", flush=True)


if __name__ == "__main__":
    main()
