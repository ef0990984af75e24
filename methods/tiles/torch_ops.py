"""Operations on one tile of similarities: torch's, or one compiled pass for fp32 on a CPU.

The compiled pass takes 0.25 ns a number, where torch's exponential alone takes 1.6; matrix products stay torch's. It
runs on one thread, so with more than MAX_THREADS torch's operations are used.
"""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kilobatch.data import triton_support
from kilobatch.methods.options import Operands

MAX_DIM = 256  # dimensions of an embedding in the kernels, whose programs keep whole rows of the gradient
CPU_TILE = (256, 1024)  # queries x keys
ACCELERATOR_TILE = (2048, 8192)  # rows x columns
MAX_THREADS = 8  # more threads finish torch's operations before one thread finishes the compiled pass
MASKED_SIMILARITY = -1e30  # e^s of it is 0; unlike -inf it can be subtracted from itself


def fused(what: str, x: Tensor, operands: Operands) -> bool:
    """True if `what`, with x's device, type and columns, is computed by the kernels of methods/losses/kernels."""
    obstacle = None
    if isinstance(x, FakeTensor):
        obstacle = "there is no data"
    elif x.dtype != torch.float32:
        obstacle = f"it is of {x.dtype}"
    elif x.shape[1] > MAX_DIM:
        obstacle = f"{x.shape[1]} dimensions are more than {MAX_DIM}"
    elif operands == "fp32" and not (triton_support.INTERPRETED or triton_support.SETTING == "all"):
        # Tensor cores do not compute them, and the registers of compiled kernels spill:
        # tests/methods/losses/test_loss_kernels.py.
        obstacle = "products of fp32 are left to its library"
    return triton_support.use_kernels(f"{what} from {operands}", x.device, obstacle)


def as_operand(x: Tensor, operands: Operands, fused: bool = False) -> Tensor:
    """x in the type that the products are computed in; only fp32 is converted.

    The kernels compute in bf16 and fp16. torch's operations compute in bf16 alone, and treat fp16 and tf32 as fp32:
    their products come out in the operands' type, and fp16 cannot hold e^s.
    """
    if x.dtype != torch.float32 or operands not in (("bf16", "fp16") if fused else ("bf16",)):
        return x
    return x.to(torch.bfloat16 if operands == "bf16" else torch.float16)


def sides(x: Tensor, cpu_tile: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of a tile; on a CPU each loss has a tile of its own."""
    return cpu_tile if x.device.type == "cpu" else ACCELERATOR_TILE


def summed_in(operand: Tensor) -> torch.dtype:
    """The type in which products of these operands are summed."""
    return torch.promote_types(operand.dtype, torch.float32)


def buffer(left: Tensor, right: Tensor, sides: tuple[int, int]) -> Tensor:
    """Flat memory for any one tile of products of left's rows with right's; both are operands."""
    return left.new_empty(min(sides[0], len(left)) * min(sides[1], len(right)), dtype=summed_in(left))


def product_(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Writes left @ right to out, whose type may be wider."""
    if left.dtype == out.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def add_product_(sums: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to sums, whose type may be wider."""
    if left.dtype == sums.dtype:
        sums.addmm_(left, right)
    else:
        sums += left @ right


def exp_and_sum_(s: Tensor, rows: Tensor, columns: Tensor | None = None) -> None:
    """s (R, C) becomes e^s, whose sums are added to rows (R,) and columns (C,), if given. Compiled: for s up to 88."""
    if _compiled(s):
        from kilobatch.methods.tiles import numba_ops  # numba takes a quarter of a second to import

        numba_ops.exp_and_sum(s.numpy(), rows.numpy(), None if columns is None else columns.numpy())
        return
    s.exp_()
    rows += s.sum(1)
    if columns is not None:
        columns += s.sum(0)


def exp_and_weigh_(s: Tensor, rows: Tensor, columns: Tensor) -> None:
    """s (R, C) becomes e^s_ij (rows_i + columns_j); rows (R,), columns (C,). Compiled: for s up to 88."""
    if _compiled(s):
        from kilobatch.methods.tiles import numba_ops

        numba_ops.exp_and_weigh(s.numpy(), rows.numpy(), columns.numpy())
        return
    s.exp_().mul_(rows[:, None] + columns)


def _compiled(s: Tensor) -> bool:
    on_cpu = s.device.type == "cpu" and not isinstance(s, FakeTensor)  # `kilobatch plan` computes without data
    return on_cpu and s.dtype == torch.float32 and torch.get_num_threads() <= MAX_THREADS
