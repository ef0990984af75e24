"""The environment of a job, and of a scheduler's commands: the caller's, without what belongs to a job of the caller's.

A shell in an allocation (salloc, srun --pty), or below mpirun or torchrun, has variables that describe the caller's own
job: its nodes, tasks, cores, ranks and GPUs. sbatch hands them on to the new job, whose srun obeys them: with
SLURM_CPU_BIND, both workers of a job were bound to the one core of the caller's shell. A job's own variables are set by
its scheduler when it begins, so nothing of them is lost.
"""

import os
import re

_REACH = ("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT")  # where the controller is
_SCHEDULERS = re.compile(r"(SLURM|SLURMD|SBATCH|SRUN|SALLOC|SQUEUE|SCANCEL|SACCT|PMI|PMI2|PMIX|OMPI|PRTE|HYDRA)_.*")
_RANKS = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|KILOBATCH_STORE|TORCHELASTIC_.*|"
    r"MPI_LOCALN?RANKS?(ID)?|MPIRUN_.*|MV2_COMM_.*|SUBMITIT_.*"
)
_BINDING = re.compile(
    r"(KMP|OMP)_AFFINITY|KMP_(HW_SUBSET|PLACE_THREADS)|GOMP_CPU_AFFINITY|OMP_(PROC_BIND|PLACES)|CPU_BIND.*"
)
_DEVICES = re.compile(r"(CUDA|HIP|ROCR)_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK")


def job_environment(*, keep_devices: bool = False) -> dict[str, str]:
    """The variables of this process that a new job, or a command of the scheduler, may have.

    keep_devices: keep those that select GPUs, which a job on this machine shares with its caller.
    """
    return {name: value for name, value in os.environ.items() if not _of_a_job(name, keep_devices)}


def left_out_options() -> list[str]:
    """The variables in which the caller keeps options of sbatch: they would override those of the job's script."""
    return sorted(name for name in os.environ if name.startswith("SBATCH_"))


def _of_a_job(name: str, keep_devices: bool) -> bool:
    if name in _REACH or (keep_devices and _DEVICES.fullmatch(name)):
        return False
    return any(pattern.fullmatch(name) for pattern in (_SCHEDULERS, _RANKS, _BINDING, _DEVICES))
