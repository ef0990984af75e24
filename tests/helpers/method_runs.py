"""Makes runs that hold checkpoints of a method without any training, and compares methods."""

from pathlib import Path

import torch

from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.launch.worker import pretrained
from kilobatch.methods.method import DataFacts, Method
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.shard import Piece
from kilobatch.trainer.checkpoint.writer import Checkpoints

KEEP = CheckpointOptions(keep_last=9)


def make_run(run: Path, changes: list[str], *steps: int, classes: int = 10, random: bool = True) -> Method:
    """Makes a run with checkpoints; returns the method as it was at the last. random: each has other random numbers in
    its tensors; else they are as the method was initialised."""
    recipe = resolve_recipe("demo", changes)
    method = pretrained.build_of_recipe(recipe, DataFacts(20, classes))
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(recipe.dump_yaml())
    meta = {"recipe": recipe.model_dump(mode="json"), "images": 20, "classes": classes}
    meta |= {"class_names": [f"class {k}" for k in range(classes)]}
    with Checkpoints(run / "checkpoints", KEEP, 0, 1) as checkpoints:
        for step in steps:
            for tensor in method.state_dict().values():
                if random and tensor.is_floating_point():
                    tensor.copy_(torch.rand_like(tensor))
            own = method.own_buffers
            pieces = {f"method.{n}": Piece.of(t.clone(), own=n in own) for n, t in method.state_dict().items()}
            checkpoints.save(step, pieces, meta, wait=True)
    return method


def same(one: Method, other: Method) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine if name not in one.own_buffers)
