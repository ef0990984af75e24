"""NT-Xent, forward and backward on one CPU thread: time and peak memory of this project's, a plain one, and lightly's.

    python -m benchmarks.nt_xent                  # 1024, 2048, 4096 and 8192 pairs, 128 dimensions; about 3 minutes
    python -m benchmarks.nt_xent 4096 --rounds 7
    python -m benchmarks.nt_xent 32768 --rounds 1 # from 16,384 pairs on only ours: plain would take 17 GB for a matrix

The last columns are this project's loss when it keeps all tiles for the backward, which takes half a matrix of memory,
and with operands=bf16; the header says how far that gradient is from fp64's for 1024 pairs.

benchmarks/turns.py says how it is measured. Our tiles need 4 M^2 D floating-point operations for M = 2 pairs rows.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.turns import HEADER, NAMES, Turn, arguments, largest, measure_pairs, quickest, row, take_turns

DIM, TEMPERATURE = 128, 0.1
OURS_ONLY = 16_384  # pairs from which on the plain version and lightly's are not measured
VARIANT_HEADER = "seconds, ours /, MiB"


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
    from kilobatch.methods.losses import nt_xent as tiles
    from kilobatch.methods.losses.contrastive import nt_xent

    if name == "all kept":
        tiles.KEPT_BYTES = 2**40
    return lambda z1, z2: nt_xent(z1, z2, TEMPERATURE, operands="bf16" if name == "bf16" else "fp32")


def bf16_error() -> float:
    """The relative error of a gradient with operands=bf16. The two views of an image are similar."""
    torch.manual_seed(0)
    z = torch.randn(1024, DIM, dtype=torch.float64)
    exact = [(z + torch.randn(1024, DIM, dtype=torch.float64)).requires_grad_() for _ in range(2)]
    half = [x.detach().float().requires_grad_() for x in exact]
    want = torch.cat(torch.autograd.grad(plain(exact[0], exact[1], TEMPERATURE), exact))
    got = torch.cat(torch.autograd.grad(loss_of("bf16")(half[0], half[1]), half))
    return ((got - want).norm() / want.norm()).item()


def main() -> None:
    options = arguments(__doc__, "pairs", [1024, 2048, 4096, 8192])
    if options.measure:
        measure_pairs(loss_of(options.measure), options.pairs[0], DIM)
        return
    print(f"pairs | {HEADER} | all kept: {VARIANT_HEADER} | bf16: {VARIANT_HEADER}; gradient {bf16_error():.1e} off")
    for pairs in options.pairs:
        names = ("ours", "bf16") if pairs >= OURS_ONLY else (*NAMES, "all kept", "bf16")
        turns = take_turns("benchmarks.nt_xent", pairs, options.rounds, names)
        variants = [variant(turns, name) for name in ("all kept", "bf16") if name in turns]
        if pairs >= OURS_ONLY:
            cells = f"{quickest(turns['ours']):.3f} s, {largest(turns['ours']):.0f} MiB"
        else:
            cells = row(turns, 4 * (2 * pairs) ** 2 * DIM)
        print(f"{pairs:5} | {' | '.join([cells, *variants])}", flush=True)


def variant(turns: dict[str, list[Turn]], name: str) -> str:
    seconds = quickest(turns[name])
    return f"{seconds:.3f} {quickest(turns['ours']) / seconds:.2f}x {largest(turns[name]):.0f}"


if __name__ == "__main__":
    main()
