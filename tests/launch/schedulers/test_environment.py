"""The variables that a job gets: none of its caller's own job."""

import os

import pytest

from kilobatch.launch.schedulers.environment import job_environment, left_out_options

CALLERS = {
    "SLURM_JOB_ID", "SLURM_CPU_BIND", "SLURM_NTASKS", "SLURM_MEM_PER_CPU", "SLURM_STEP_NODELIST", "SLURMD_NODENAME",
    "SBATCH_ACCOUNT", "SBATCH_EXPORT", "SRUN_CPUS_PER_TASK", "SALLOC_PARTITION", "SQUEUE_PARTITION", "SCANCEL_STATE",
    "KILOBATCH_STORE", "KMP_AFFINITY", "GOMP_CPU_AFFINITY", "OMP_PROC_BIND", "OMP_PLACES", "RANK", "WORLD_SIZE",
    "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PMI_RANK", "PMI_SIZE",
    "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_RANK", "TORCHELASTIC_RUN_ID",
    "SUBMITIT_EXECUTOR", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL",
}  # fmt: skip
OTHERS = {"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "OMP_NUM_THREADS", "KILOBATCH_CACHE", "NCCL_DEBUG", "MY_RANK"}


def test_a_job_gets_nothing_of_its_callers_job(monkeypatch: pytest.MonkeyPatch):
    for name in (*CALLERS, *OTHERS):
        monkeypatch.setenv(name, "1")
    got = job_environment()
    assert not got.keys() & CALLERS
    assert got.keys() >= {*OTHERS, "PATH", "HOME"} and got.keys() <= os.environ.keys()
    assert {"CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"} <= job_environment(keep_devices=True).keys()
    assert left_out_options() == ["SBATCH_ACCOUNT", "SBATCH_EXPORT"]
