"""Which worker this process is, on which device, and its connection to the others."""

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from data.refusal import Refusal

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """rank in [0, size); local_rank in [0, local_size): among the workers on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    def connect(self, timeout: timedelta = timedelta(minutes=30)) -> None:
        """Joins the process group: NCCL on cuda, gloo on a CPU. Whoever calls this ends with
        `torch.distributed.destroy_process_group()`, or gloo may abort at exit."""
        backend, device_id = "gloo", None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            # A resumed run is to equal the uninterrupted one to the bit, so no algorithm may be chosen by its timing.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
            backend, device_id = "nccl", self.device
        if "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend, timeout=timeout, rank=self.rank, world_size=self.size, device_id=device_id)
        else:  # alone: no one to meet, so no port
            dist.init_process_group(
                backend, store=HashStore(), timeout=timeout, rank=0, world_size=1, device_id=device_id
            )


def world(device: Literal["auto", "cpu", "cuda"]) -> World:
    """This process's place, as torchrun and our own launcher export it; alone where none of it is set.

    Raises Refusal where it is set in part, is no number, or contradicts itself, and where the device is not there.
    """
    given = [name for name in _NAMES if name in os.environ]
    if not given:
        return World(0, 1, 0, 1, pick_device(device, 0))
    if missing := [name for name in _NAMES if name not in os.environ]:
        raise Refusal(f"{', '.join(given)} set, but {', '.join(missing)} not: set all of them (torchrun does), or none")
    size, rank, local_rank = _number("WORLD_SIZE"), _number("RANK"), _number("LOCAL_RANK")
    local_size = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else size
    _number("MASTER_PORT")
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise Refusal(
            f"RANK={rank} of WORLD_SIZE={size}, LOCAL_RANK={local_rank} of {local_size} on this machine: "
            "ranks run from 0 to the size less one"
        )
    return World(rank, size, local_rank, local_size, pick_device(device, local_rank))


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise Refusal(f"{name} is '{text}'; it should be a whole number")
    return int(text)


def pick_device(device: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """The device of a machine's worker. Raises Refusal where cuda is asked for and not there."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise Refusal("run.device is cuda, but torch sees no CUDA device here; use run.device=cpu or auto")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise Refusal(f"worker {local_rank + 1} of this machine has no GPU: there are {gpus}; use --workers {gpus}")
    return torch.device("cuda", local_rank)
