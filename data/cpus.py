"""The share of the processors that a worker may use."""

import os


def spare_threads(sharing: int) -> int:
    """Threads for one worker: its share of the allowed processors, where `sharing` workers use the same ones."""
    allowed = len(os.sched_getaffinity(0))
    granted = int(os.environ.get("SLURM_CPUS_PER_TASK", allowed))
    return max(1, min(allowed, granted) // sharing)
