"""Picks the devices of this machine for a recipe's workers. Used where they run, not where a job is only submitted.

torch is loaded only where the machine may have a GPU: in a launcher it takes seconds, before the first word.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kilobatch.data.errors import UserError, warn
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.runs import identity
from kilobatch.trainer.options import Precision
from kilobatch.trainer.ranks.gpu_driver import has_gpu_driver

if TYPE_CHECKING:
    import torch


def default_workers(recipe: Recipe) -> int:
    """The number of workers by default: one for each GPU, or one on a CPU. Raises UserError where run.device is cuda
    and torch sees none."""
    return _gpus() if _on_gpus(recipe.run.device) else 1


def check_device(recipe: Recipe, workers: int) -> None:
    """Raises UserError where a worker would find no device."""
    if _on_gpus(recipe.run.device):
        _refuse_more_than(_gpus(), workers)


def pick_device(device: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    """The device of a machine's worker. Raises UserError where cuda is asked for, in the recipe or from SLURM, and
    torch sees none, and for a worker without a GPU of its own."""
    import torch

    if not _on_gpus(device):
        return torch.device("cpu")
    _refuse_more_than(_gpus(), local_rank + 1)
    return torch.device("cuda", local_rank)


def with_precision(run: Path, recipe: Recipe, device: torch.device) -> Recipe:
    """The recipe with the precision of the run's training: where it says auto, the one that it began with, which is the
    least that any rank's device had units for. All ranks call it together."""
    if recipe.engine.precision != "auto":
        return recipe
    from kilobatch.methods import collectives

    least = least_precision(device)
    precision: Precision = collectives.from_rank_0(lambda: identity.pin_precision(run, least))
    if precision != least == "fp32" and collectives.rank() == 0:
        warn(
            f"this run began in {precision}, for which a worker's device has no units now: it goes on so, but slowly; "
            "use machines like those that it began on"
        )
    return recipe.model_copy(update={"engine": recipe.engine.decided(precision)})


def least_precision(device: torch.device) -> Precision:
    """The precision that every rank's device has units for. All ranks call it together."""
    import torch

    from kilobatch.methods import collectives
    from kilobatch.trainer import engine

    lacks = torch.tensor([int(not engine.has_bf16_units(device))], device=device)
    return "fp32" if collectives.all_reduce_max(lacks).item() else "bf16"


def _on_gpus(device: Literal["auto", "cpu", "cuda"]) -> bool:
    slurm_gpus = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if device == "auto" and slurm_gpus != "0" and not _gpus():
        raise UserError(
            f"SLURM gave this job {slurm_gpus} GPUs here, but torch sees none; mend that, or use run.device=cpu"
        )
    if device == "cuda" and not _gpus():
        raise UserError("run.device is cuda, but torch sees no CUDA device here; use run.device=cpu or auto")
    return device != "cpu" and _gpus() > 0


def _refuse_more_than(gpus: int, workers: int) -> None:
    if workers > gpus:
        raise UserError(f"worker {workers} of this machine has no GPU: there are {gpus}; use --workers {gpus}")


def _gpus() -> int:
    """The GPUs that torch sees."""
    if not has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0
