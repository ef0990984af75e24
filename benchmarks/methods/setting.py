"""The training that every method gets: images, views, encoder, optimizer and schedule; by one rule for all."""

import json
from dataclasses import dataclass

from kilobatch.data.views.options import Views
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.trainer.optim.schedules import ScheduleOptions

# By the name of a row, the recipe with what its paper fixes: heads, temperatures, momenta, queues, weights of terms.
RECIPES = {
    name: f"{name}_cifar10"
    for name in (
        "instance_discrimination",
        "pirl",
        "simclr",
        "simclr_v2",
        "moco_v2",
        "mochi",
        "moco_v3",
        "byol",
        "simsiam",
        "nnclr",
        "swav",
        "deepcluster_v2",
        "dino",
        "barlow_twins",
        "vicreg",
        "pcl",
        "hcsc",
        "mice",
    )
}
VIEWS = "simclr_cifar10_lightly"  # the recipe with the views


@dataclass(frozen=True)
class Setting:
    """source: as in data.train, of the images alone; lr: of AdamW; weight_decay: not of norms and biases."""

    source: str
    width: int
    epochs: int
    batch: int = 256
    lr: float = 0.002
    weight_decay: float = 1e-4

    @property
    def schedule(self) -> ScheduleOptions:
        return ScheduleOptions(epochs=self.epochs, warmup_epochs=self.epochs / 20)

    @property
    def views(self) -> Views:
        return resolve_recipe(VIEWS, []).data.groups[0]

    def changes(self, name: str, test: str, seed: int) -> list[str]:
        """What `kilobatch train` changes in the recipe of a method."""
        own = resolve_recipe(RECIPES[name], []).data.groups[0]
        views = self.views.model_dump(mode="json", exclude={"count", "second"})
        if not own.by_patch:  # PIRL's jigsaw is its second view
            views["second"] = None
        return [
            f"data.train={self.source}",
            f"data.test={test}",
            f"data.batch={self.batch}",
            "data.threads=1",
            *(f"data.views.{key}={json.dumps(value)}" for key, value in views.items()),
            "encoder.name=convnet",
            f"encoder.width={self.width}",
            "optimizer.name=adamw",
            f"optimizer.lr={self.lr}",
            "optimizer.scaling=none",
            f"optimizer.weight_decay={self.weight_decay}",
            "optimizer.decay_norms=false",
            "schedule.name=cosine",
            "schedule.milestones=[]",
            "schedule.by_epoch=false",
            f"schedule.epochs={self.epochs}",
            f"schedule.warmup_epochs={self.epochs / 20}",
            "engine.precision=bf16",
            "evaluate.every_epochs=0",
            "evaluate.knn={k: 200, temperature: 0.1}",
            "evaluate.final=[knn]",
            "checkpoint.every_minutes=60",
            f"run.seed={seed}",
        ]
