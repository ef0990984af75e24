"""Picks the devices of this machine for a recipe's workers. Used where they run, not where a job is only submitted."""

import os
from typing import Literal

import torch

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes.recipe import Recipe


def default_workers(recipe: Recipe) -> int:
    """The number of workers by default: one for each GPU, or one on a CPU. Raises UserError where run.device is cuda
    and torch sees none."""
    return torch.cuda.device_count() if pick_device(recipe.run.device, 0).type == "cuda" else 1


def check_device(recipe: Recipe, workers: int) -> None:
    """Raises UserError where a worker would find no device."""
    pick_device(recipe.run.device, workers - 1)


def pick_device(device: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """The device of a machine's worker. Raises UserError where cuda is asked for, in the recipe or from SLURM, and
    torch sees none, and for a worker without a GPU of its own."""
    slurm_gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if device == "auto" and slurm_gpus != "0" and not torch.cuda.is_available():
        raise UserError(
            f"SLURM gave this job {slurm_gpus} GPUs here, but torch sees none; mend that, or use run.device=cpu"
        )
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device is cuda, but torch sees no CUDA device here; use run.device=cpu or auto")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise UserError(f"worker {local_rank + 1} of this machine has no GPU: there are {gpus}; use --workers {gpus}")
    return torch.device("cuda", local_rank)
