"""Block sizes and launches of the kernels, and the functions that they share.

Sizes are the same in every run on a machine, not tuned by time, so that sums keep their order. A tile of similarities
is a product of rows: a program has BM rows and loops over the columns, BN at a time. If there would be too few programs
for the device, the columns are split among several, whose partial results are added in order.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kilobatch.data.triton_support import INTERPRETED
from kilobatch.methods.options import Operands
from kilobatch.methods.tiles.torch_ops import MASKED_SIMILARITY

LARGE_SHARED_MEMORY = 160 << 10  # bytes; from there on a third stage, or larger blocks, fit
MASKED = tl.constexpr(MASKED_SIMILARITY)  # kernels read no other globals than constexprs

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRITON = {"fp32": tl.float32, "tf32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
PRECISION = {"fp32": "ieee", "tf32": "tf32", "bf16": "ieee", "fp16": "ieee"}  # of products of fp32
# fp16 has no exponent for the smallest weights, so they are scaled up before they are rounded.
WEIGHT_SCALE = {"fp32": 1.0, "tf32": 1.0, "bf16": 1.0, "fp16": 2.0**14}


@dataclass(frozen=True)
class BlockSizes:
    bm: int
    bn: int
    bd: int
    warps: int
    stages: int


def block_sizes(dim: int, operands: Operands, shared_memory: int) -> BlockSizes:
    """Block sizes for embeddings of `dim` dimensions. shared_memory: bytes that a program may have; consumers' GPUs
    have 99 KiB, others 163 and more."""
    bd, large = max(16, triton.next_power_of_2(dim)), shared_memory >= LARGE_SHARED_MEMORY
    if DTYPES[operands].itemsize == 4:
        return BlockSizes(64, 64, bd, 8, 2) if bd <= 128 else BlockSizes(64 if large else 32, 32, bd, 8, 2)
    return BlockSizes(64 if bd > 128 else 128, 64, bd, 8, 3 if bd <= 128 and large else 2)


def kernel_options(dim: int, operands: Operands, shared_memory: int) -> dict[str, Any]:
    """Constants and launch options that every kernel takes, by name."""
    sizes = block_sizes(dim, operands, shared_memory)
    return {
        "D": dim,
        "BM": sizes.bm,
        "BN": sizes.bn,
        "BD": sizes.bd,
        "OPERAND": TRITON[operands],
        "PRECISION": PRECISION[operands],
        "WEIGHT_SCALE": WEIGHT_SCALE[operands],
        "UPCAST": INTERPRETED,  # the interpreter has no products of bf16; in fp32 those of two bf16 are exact
        "num_warps": sizes.warps,
        "num_stages": sizes.stages,
        "enable_fp_fusion": True,  # also triton's default today, which it announces to change
    }


@dataclass(frozen=True)
class Launch:
    """A kernel's launch over (rows, columns): the number of programs along each, and the columns of one program, a
    multiple of BN."""

    row_programs: int
    column_programs: int
    columns_per_program: int
    options: dict[str, Any]

    def run(self, kernel: Any, *arguments: Any, **constants: bool) -> None:
        kernel[(self.row_programs, self.column_programs)](*arguments, **constants, **self.options)


def plan_launch(rows: int, columns: int, dim: int, operands: Operands, device: torch.device) -> Launch:
    processors, shared_memory = _device_limits(device)
    sizes = block_sizes(dim, operands, shared_memory)
    row_programs, tiles = triton.cdiv(rows, sizes.bm), max(1, triton.cdiv(columns, sizes.bn))
    columns_per_program = triton.cdiv(tiles, min(tiles, max(1, 2 * processors // row_programs)))
    return Launch(
        row_programs,
        triton.cdiv(tiles, columns_per_program),
        columns_per_program * sizes.bn,
        kernel_options(dim, operands, shared_memory),
    )


def _device_limits(device: torch.device) -> tuple[int, int]:
    """The number of multiprocessors, and the bytes of shared memory that a program may have; 1 and 0 if interpreted."""
    if INTERPRETED:
        return 1, 0
    gpu = torch.cuda.get_device_properties(device)
    return gpu.multi_processor_count, gpu.shared_memory_per_block_optin


def check_contiguous(*tensors: Tensor) -> None:
    """Asserts that tensors are contiguous, since the kernels take no strides."""
    for x in tensors:
        assert x.is_contiguous(), x.stride()


@triton.jit
def load_rows(base, rows, count, D: tl.constexpr, BD: tl.constexpr):
    """Loads rows of a matrix (count, D) -> (len(rows), BD): the last row for those beyond count, zeros beyond D."""
    d = tl.arange(0, BD)
    offsets = tl.minimum(rows, count - 1)[:, None].to(tl.int64) * D + d[None, :]
    if BD > D:
        loaded = tl.load(base + offsets, mask=(d < D)[None, :], other=0.0)
    else:
        loaded = tl.load(base + offsets)
    return loaded


@triton.jit
def product(left, right, sums, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """sums + left @ right, in fp32."""
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision=PRECISION)
