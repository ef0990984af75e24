"""Sizes of a kernel's tiles, the same in every run on a machine, so that sums keep their order: no tuning by time.

Similarities are products of rows; a program has BM of them and runs over the columns, BN at a time. Where programs
would be too few for the device, the columns are split among several, whose partial results are added in order.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kilobatch.data.triton_support import INTERPRETED
from kilobatch.methods.options import Operands

ROOMY = 160 << 10  # bytes of shared memory from which a third stage is for the taking
LEFT_OUT = tl.constexpr(-1e30)  # a similarity that counts for nothing; unlike -inf it can be subtracted from itself

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRITON = {"fp32": tl.float32, "tf32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
PRECISION = {"fp32": "ieee", "tf32": "tf32", "bf16": "ieee", "fp16": "ieee"}  # how fp32 factors are multiplied
# fp16 has no exponent for the smallest weights: they are multiplied before they are rounded.
LIFT = {"fp32": 1.0, "tf32": 1.0, "bf16": 1.0, "fp16": 2.0**14}


@dataclass(frozen=True)
class Blocks:
    bm: int
    bn: int
    bd: int
    warps: int
    stages: int


def blocks(dim: int, operands: Operands, room: int) -> Blocks:
    """room: bytes of shared memory that a program may have; consumers' GPUs have 99 KiB, others 163 and more."""
    bd = max(16, triton.next_power_of_2(dim))
    if DTYPES[operands].itemsize == 4:
        return Blocks(64, 64, bd, 8, 2) if bd <= 128 else Blocks(64 if room >= ROOMY else 32, 32, bd, 8, 2)
    return Blocks(64 if bd > 128 else 128, 64, bd, 8, 3 if bd <= 128 and room >= ROOMY else 2)


def options(dim: int, operands: Operands, room: int) -> dict[str, Any]:
    """What every kernel takes by these names."""
    b = blocks(dim, operands, room)
    return {
        "D": dim,
        "BM": b.bm,
        "BN": b.bn,
        "BD": b.bd,
        "OPERAND": TRITON[operands],
        "PRECISION": PRECISION[operands],
        "LIFT": LIFT[operands],
        "WIDEN": INTERPRETED,  # its products do not know bf16; those of two bf16 are exact in fp32
        "num_warps": b.warps,
        "num_stages": b.stages,
        "enable_fp_fusion": True,  # also triton's default, which it announces to change
    }


@dataclass(frozen=True)
class Launch:
    """How a kernel runs over (rows, columns): programs by rows and by columns, and the columns that each has, a
    multiple of BN."""

    by_rows: int
    by_columns: int
    per: int
    options: dict[str, Any]

    def start(self, kernel: Any, *arguments: Any, **constants: bool) -> None:
        kernel[(self.by_rows, self.by_columns)](*arguments, **constants, **self.options)


def launch(rows: int, columns: int, dim: int, operands: Operands, device: torch.device) -> Launch:
    processors, room = _surroundings(device)
    b = blocks(dim, operands, room)
    by_rows, tiles = triton.cdiv(rows, b.bm), max(1, triton.cdiv(columns, b.bn))
    per = triton.cdiv(tiles, min(tiles, max(1, 2 * processors // by_rows)))
    return Launch(by_rows, triton.cdiv(tiles, per), per * b.bn, options(dim, operands, room))


def _surroundings(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have; interpreted, some numbers."""
    if INTERPRETED:
        return 1, 0
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin


def contiguous(*tensors: Tensor) -> None:
    """The kernels know no strides."""
    for x in tensors:
        assert x.is_contiguous(), x.stride()


@triton.jit
def load_rows(base, rows, count, D: tl.constexpr, BD: tl.constexpr):
    """(len(rows), BD) of a matrix (count, D): beyond its end the last row again, beyond D zeros."""
    d = tl.arange(0, BD)
    at = tl.minimum(rows, count - 1)[:, None].to(tl.int64) * D + d[None, :]
    if BD > D:
        found = tl.load(base + at, mask=(d < D)[None, :], other=0.0)
    else:
        found = tl.load(base + at)
    return found


@triton.jit
def product(left, right, sums, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """sums + left @ right, fp32."""
    if WIDEN:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)
