"""The processors of this machine: the share of them that a worker may use, and what they have units for."""

import os
from pathlib import Path

# Values of oneDNN's variable that keep it from 16-bit units: below the first instruction set that has them.
WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
BF16_FLAGS = {"avx512_bf16", "amx_bf16"}


def spare_threads(sharing: int) -> int:
    """Threads for one worker: its share of the allowed processors, where `sharing` workers use the same ones."""
    allowed = len(os.sched_getaffinity(0))
    granted = int(os.environ.get("SLURM_CPUS_PER_TASK", allowed))
    return max(1, min(allowed, granted) // sharing)


def has_bf16_units(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU multiplies bfloat16 by units of its own (AVX-512 BF16, AMX), and oneDNN, which
    computes torch's layers, may use them: ONEDNN_MAX_CPU_ISA may forbid it."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    if limit.upper() in WITHOUT_BF16 or not cpuinfo.exists():
        return False
    flags = next((line for line in cpuinfo.read_text().splitlines() if line.startswith("flags")), "")
    return not BF16_FLAGS.isdisjoint(flags.split())
