"""What this machine has for a recipe's workers: asked where they are to run, not where a job is only submitted."""

import torch

from kilobatch.launch.recipe import Recipe
from kilobatch.launch.world import pick_device


def default_workers(recipe: Recipe) -> int:
    """One for each GPU, or one on a CPU. Raises Refusal where cuda is asked for and not there."""
    return torch.cuda.device_count() if pick_device(recipe.run.device, 0).type == "cuda" else 1


def check_device(recipe: Recipe, workers: int) -> None:
    """Raises Refusal where a worker would find no device."""
    pick_device(recipe.run.device, workers - 1)
