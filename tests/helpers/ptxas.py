"""Compiles Triton kernels to machine code for GPUs that this machine need not have, by the ptxas that triton brings."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# By compute capability: bytes of shared memory that a program may have; assert_fits leaves one KiB of them free.
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
LAUNCH = ("num_warps", "num_stages", "enable_fp_fusion")


class Built(NamedTuple):
    shared: int  # bytes
    registers: int  # of a thread
    stack: int  # bytes of a thread: spilled registers
    ptx: str


def build(kernel: Any, types: dict[str, str], values: dict[str, Any], capability: int) -> Built:
    """Compiles a kernel. types: of arguments, i32 for those not named; values: of constexprs and launch options."""
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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(built.asm["cubin"])
        cuobjdump = Path(triton.backends.nvidia.__path__[0], "bin", "cuobjdump")
        out = subprocess.run(
            [cuobjdump, "--dump-resource-usage", cubin.name], check=True, capture_output=True, text=True
        )
    usage = re.search(r"REG:(\d+) STACK:(\d+)", out.stdout)
    assert usage, out.stdout
    return Built(built.metadata.shared, int(usage[1]), int(usage[2]), built.asm["ptx"])


def assert_fits(built: Built, operands: str, capability: int, case: object) -> None:
    """Asserts that a kernel fits the GPU's shared memory, and, except for fp32, that it uses tensor cores and spills no
    registers."""
    assert built.shared <= SHARED_MEMORY[capability] - 1024, (case, built.shared)
    if operands == "fp32":  # its products take so many registers that they spill; it is not used by default
        return
    assert ("wgmma" if capability == 90 else "mma.sync") in built.ptx
    assert built.stack <= 64, (case, built.stack)  # bytes of spilled registers
