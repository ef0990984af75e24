"""Files of a run that has begun, without any training: images, and checkpoints without tensors."""

from pathlib import Path

import numpy as np

from kilobatch.launch.recipes import changes
from kilobatch.launch.recipes.data import prepare_data
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.runs import run_folder
from kilobatch.trainer.checkpoint.description import sealed

SMALL = ["data.train=npz:train.npz", "data.test=npz:test.npz", "data.batch=4", "data.views.size=8", "encoder.width=2"]
SMALL += ["evaluate.knn.k=3"]
NAMES = ["ant", "bee"]


def images(file: str, seed: int, names: list[str] = NAMES) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 8, 3), np.uint8)
    np.savez(file, images=pixels, labels=np.arange(8) % 2, class_names=names)


def begun(recipe: Recipe) -> Path:
    """The folder of a run that has begun and taken three steps."""
    folder = run_folder.create_run(recipe.run.model_copy(update={"name": "r"}), "demo", recipe.dump_yaml(), 1)
    changes.begin_or_compare(folder, recipe, prepare_data(recipe))
    checkpoint(folder, 3)
    return folder


def checkpoint(folder: Path, step: int, **meta: object) -> None:
    path = folder / "checkpoints" / f"step-{step:08}"
    path.mkdir()
    (path / "checkpoint.json").write_bytes(sealed({"meta": {"step": step, **meta}}))
