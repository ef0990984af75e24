"""Triton's kernels compiled for GPUs that need not be there, down to machine code, by the ptxas that triton brings."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# Compute capability: bytes of shared memory that a program may have, less one KiB of its own
ROOM = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
LAUNCH = ("num_warps", "num_stages", "enable_fp_fusion")


class Built(NamedTuple):
    shared: int  # bytes
    registers: int  # of a thread
    stack: int  # bytes of a thread: spilled registers
    ptx: str


def build(kernel: Any, types: dict[str, str], values: dict[str, Any], capability: int) -> Built:
    """types: of arguments, i32 for those not named; values: of the constexprs, and how it is launched."""
    signature, constants, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in values:
            signature[name], constants[i,] = "constexpr", values[name]
        else:
            signature[name] = types.get(name, "i32")
            if signature[name].startswith("*"):
                aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {name: values[name] for name in LAUNCH if name in values}
    built: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(built.asm["cubin"])
        tool = Path(triton.backends.nvidia.__path__[0], "bin", "cuobjdump")
        out = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    used = re.search(r"REG:(\d+) STACK:(\d+)", out.stdout)
    assert used, out.stdout
    return Built(built.metadata.shared, int(used[1]), int(used[2]), built.asm["ptx"])


def assert_fits(built: Built, operands: str, capability: int, what: object) -> None:
    """Within the GPU's shared memory; by tensor cores and without spilled registers, but for fp32."""
    assert built.shared <= ROOM[capability] - 1024, (what, built.shared)
    if operands == "fp32":  # whose products take so many registers that they spill: not chosen of itself
        return
    assert ("wgmma" if capability == 90 else "mma.sync") in built.ptx
    assert built.stack <= 64, (what, built.stack)  # bytes of spilled registers
