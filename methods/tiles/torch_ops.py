"""What a tiled loss does with a tile of similarities: torch's operations, or one compiled pass for fp32 on a CPU.

There the pass takes 0.25 ns a number, where torch's exponential alone takes 1.6, and leaves the matrix products alone.
It runs on one thread, so many threads are left to torch.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kilobatch.data import triton_support as chosen
from kilobatch.methods.options import Operands

MOST_DIM = 256  # of an embedding, for the kernels: a program keeps whole rows of the gradient
ACCELERATOR_TILE = (2048, 8192)  # rows x columns
MOST_THREADS = 8  # from there on, as many threads share torch's operations for no longer than one needs for the pass


def fused(what: str, x: Tensor, operands: Operands) -> bool:
    """Whether `what`, with x's device, type and columns, is left to the kernels of methods/losses/kernels."""
    beyond = None
    if isinstance(x, FakeTensor):
        beyond = "there is no data"
    elif x.dtype != torch.float32:
        beyond = f"it is of {x.dtype}"
    elif x.shape[1] > MOST_DIM:
        beyond = f"{x.shape[1]} dimensions are more than {MOST_DIM}"
    elif operands == "fp32" and not (chosen.INTERPRETED or chosen.ASKED == "all"):
        # Tensor cores do not take them, and the registers of compiled kernels spill:
        # tests/methods/losses/test_loss_kernels.py.
        beyond = "products of fp32 are left to its library"
    return chosen.fused(f"{what} from {operands}", x.device, beyond)


def as_operand(x: Tensor, operands: Operands, fused: bool = False) -> Tensor:
    """fp32 x as it is computed with; other than the kernels, torch's operations take tf32 and fp16 for fp32. Halves'
    products come as halves here, their sums being fp32 inside: bf16's have the exponents for e^s, fp16's have not.
    """
    if x.dtype != torch.float32 or operands not in (("bf16", "fp16") if fused else ("bf16",)):
        return x
    return x.to(torch.bfloat16 if operands == "bf16" else torch.float16)


def sides(x: Tensor, on_cpu: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a tile; on a CPU each loss has its own."""
    return on_cpu if x.device.type == "cpu" else ACCELERATOR_TILE


def summed_in(operand: Tensor) -> torch.dtype:
    """The type in which products of operands are summed."""
    return torch.promote_types(operand.dtype, torch.float32)


def buffer(left: Tensor, right: Tensor, sides: tuple[int, int]) -> Tensor:
    """Flat memory that holds any one tile of products of left's rows, which are operands, with right's."""
    return left.new_empty(min(sides[0], len(left)) * min(sides[1], len(right)), dtype=summed_in(left))


def product_(left: Tensor, right: Tensor, out: Tensor) -> None:
    """left @ right to out, which may be wider."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def add_product_(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to sums, which may be wider."""
    if left.dtype == sums.dtype:
        sums.addmm_(left, right)
    else:
        sums += left @ right


def exp_and_sum_(s: Tensor, rows: Tensor, columns: Tensor | None = None) -> None:
    """s (R, C) becomes e^s; its sums are added to rows (R,) and, if given, columns (C,). Compiled: for s up to 88."""
    if _compiled(s):
        from kilobatch.methods.tiles import numba_ops as tiles_compiled  # numba takes a quarter of a second to import

        tiles_compiled.exp_and_sum(s.numpy(), rows.numpy(), None if columns is None else columns.numpy())
        return
    s.exp_()
    rows += s.sum(1)
    if columns is not None:
        columns += s.sum(0)


def exp_and_weigh_(s: Tensor, rows: Tensor, columns: Tensor) -> None:
    """s (R, C) becomes e^s_ij (rows_i + columns_j); rows (R,), columns (C,). Compiled: for s up to 88."""
    if _compiled(s):
        from kilobatch.methods.tiles import numba_ops as tiles_compiled

        tiles_compiled.exp_and_weigh(s.numpy(), rows.numpy(), columns.numpy())
        return
    s.exp_().mul_(rows[:, None] + columns)


def _compiled(s: Tensor) -> bool:
    held = s.device.type == "cpu" and not isinstance(s, FakeTensor)  # which has no data: `kilobatch plan`
    return held and s.dtype == torch.float32 and torch.get_num_threads() <= MOST_THREADS


CPU_TILE = (256, 1024)  # queries x keys
