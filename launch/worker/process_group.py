"""Finds this worker's rank and device from the environment, and connects it to the other workers."""

import math
import os
import re
import socket
import subprocess
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import (
    FileStore,  # pyright: ignore[reportPrivateImportUsage]
    HashStore,  # pyright: ignore[reportPrivateImportUsage]
    distributed_c10d,
)

from kilobatch.data.errors import UserError
from kilobatch.launch.processes.worker_processes import STORE_FILE
from kilobatch.launch.worker.devices import pick_device
from kilobatch.launch.worker.ports import ports

NO_LIMIT = timedelta(days=7)  # the longest timeout: sockets take at most 24 days
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This worker's place. rank in [0, size): among all; local_rank in [0, local_size): among those of this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    def connect(self, timeout: timedelta) -> None:
        """Joins the process group: NCCL on cuda, gloo on a CPU. The caller has to end with
        `torch.distributed.destroy_process_group()`, or gloo may abort at exit.

        timeout: of each collective, also in groups that are made later, as DeepSpeed's are: by themselves they would
        have torch's own timeout, 10 minutes with NCCL. What the environment says of NCCL's watchdog stays.
        """
        distributed_c10d.default_pg_timeout = timeout
        distributed_c10d.default_pg_nccl_timeout = timeout  # pyright: ignore[reportPrivateImportUsage]
        # Its monitor kills a process whose watchdog waits in a call of NCCL's for so long, by itself after 8 minutes.
        os.environ.setdefault("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", str(math.ceil(timeout.total_seconds())))
        backend, device_id = "gloo", None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # A resumed run must equal the uninterrupted one bit by bit, so no algorithm may be chosen by its timing.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
            backend, device_id = "nccl", self.device
        dist.init_process_group(
            backend,
            store=self._store(),
            timeout=timeout,
            rank=self.rank,
            world_size=self.size,
            device_id=device_id,
        )

    def _store(self) -> FileStore | HashStore | None:
        """Where the ranks meet, if not at MASTER_ADDR and MASTER_PORT. A single worker meets no other."""
        if self.size == 1:
            return HashStore()
        file = os.environ.get(STORE_FILE)
        return FileStore(file, self.size) if file else None


def group_timeout(stall_minutes: float | None) -> timedelta:
    """The process group's timeout for run.stall_minutes: twice that, and at least half an hour more.

    So a launcher is always the first to notice a hang. It names the rank that hangs; a timeout ends the ranks that wait
    for it. Without a launcher, the timeout alone ends a hang.
    """
    if stall_minutes is None:
        return NO_LIMIT
    return min(timedelta(minutes=stall_minutes + max(stall_minutes, 30.0)), NO_LIMIT)


def world_from_environment(device: Literal["auto", "cpu", "cuda"]) -> World:
    """This process's place, as our launcher or torchrun exports it, or else srun; a single worker where none does.

    Raises UserError where it is set in part, is no number, or contradicts itself, and where the device is not there.
    """
    present = [name for name in _NAMES if name in os.environ]
    if not present and "SLURM_PROCID" in os.environ:
        os.environ |= from_slurm()
        present = [name for name in _NAMES if name in os.environ]
    if not present:
        return World(0, 1, 0, 1, pick_device(device, 0))
    if missing := [name for name in _NAMES if name not in os.environ]:
        raise UserError(
            f"{', '.join(present)} set, but {', '.join(missing)} not: set all of them (torchrun does), or none"
        )
    size, rank, local_rank = _number("WORLD_SIZE"), _number("RANK"), _number("LOCAL_RANK")
    local_size = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else size
    _number("MASTER_PORT")
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise UserError(
            f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of {local_size} on this machine: "
            "ranks run from 0 to the size less one"
        )
    return World(rank, size, local_rank, local_size, pick_device(device, local_rank))


def from_slurm() -> dict[str, str]:
    """The variables of a task that srun has started, as torchrun would set them; none for a single task.

    Raises UserError for several tasks that srun has not started, and where the first host's address is not found.
    """
    if "SLURM_STEP_NUM_TASKS" not in os.environ:  # a batch script's own process, or a shell's in an allocation
        tasks = _number("SLURM_NTASKS") if "SLURM_NTASKS" in os.environ else 1
        if tasks > 1:
            raise UserError(f"SLURM_NTASKS is {tasks}, but this process was not started by srun; put srun before it")
        return {}
    size, rank, local_rank = (_number(f"SLURM_{name}") for name in ("STEP_NUM_TASKS", "PROCID", "LOCALID"))
    per_node, node = _tasks_per_node(os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")), _number("SLURM_NODEID")
    if size == 1:
        return {}
    if sum(per_node) != size or node >= len(per_node):
        raise UserError(
            f"SLURM_STEP_NUM_TASKS is {size}, but SLURM_STEP_TASKS_PER_NODE {os.environ['SLURM_STEP_TASKS_PER_NODE']} "
            f"and SLURM_NODEID {node}: these contradict each other"
        )
    step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}-{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(per_node[node]),
        "MASTER_ADDR": _first_host() if len(per_node) > 1 else "127.0.0.1",
        "MASTER_PORT": str(next(ports(step))),
    }


def _tasks_per_node(text: str) -> list[int]:
    """ "2(x3),1" -> [2, 2, 2, 1]. Raises UserError for anything else."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE is '{text}'; it should be like 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _first_host() -> str:
    """The name of the step's first host. Raises UserError where it is unknown or has no address."""
    nodes = os.environ["SLURM_STEP_NODELIST"]
    try:
        output = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"scontrol does not tell the hosts of {nodes} ({error}); set MASTER_ADDR and the others"
        ) from error
    host = output.stdout.split()[0]
    try:
        socket.getaddrinfo(host, None)
    except socket.gaierror as error:
        raise UserError(f"the first host of {nodes}, {host}, has no address here ({error.strerror})") from error
    return host


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise UserError(f"{name} is '{text}'; it should be a whole number")
    return int(text)
