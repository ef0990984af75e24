"""Plans a run: the memory, traffic and time that it will need on machines that need not be there. Takes no memory.

Modules that import torch are imported in the functions that need them, so that a bad recipe is refused before that.
"""

from dataclasses import asdict, dataclass
from typing import Any

from kilobatch.data.errors import UserError
from kilobatch.data.files import describe_bytes
from kilobatch.data.loading.labels import count_labelled, count_used
from kilobatch.data.sources.specs import count_images
from kilobatch.launch.planning import machines
from kilobatch.launch.planning.duration import Duration, Setting, estimate_duration
from kilobatch.launch.planning.fit import Fit, FitSearch, ways_out
from kilobatch.launch.planning.machines import Machine, Measured
from kilobatch.launch.planning.photos import Photos
from kilobatch.launch.planning.step_time import Time, estimate_time
from kilobatch.launch.recipes.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """The plan of a run. steps: of the whole training; stages: bytes of optimizer and ZeRO, and of all memory, by ZeRO
    stage; duration: of the whole run, None: not known; measured: the rates that took the place of assumed ones."""

    recipe: Recipe
    machine: Machine
    nodes: int
    fit: Fit
    stages: dict[int, tuple[int, int]]
    time: Time
    steps: int
    duration: Duration | None
    measured: Measured | None

    def as_json(self) -> dict[str, Any]:
        duration, ranks = self.duration, self.fit.layout.ranks
        return {
            "gpu": self.machine.name,
            "nodes": self.nodes,
            "ranks": ranks,
            "samples_per_rank": self.fit.layout.samples,
            "chunks": self.fit.layout.chunks,
            "keep": self.fit.keep,
            "zero": self.fit.zero,
            "memory": {
                "moment": self.fit.memory.moment,
                "parts": dict(self.fit.memory.parts),
                "total": self.fit.memory.total,
                "limit": self.fit.limit,
                "by_zero_stage": {z: {"optimizer": own, "total": total} for z, (own, total) in self.stages.items()},
            },
            "step": {**asdict(self.time), "binds": self.time.binds},
            "steps": self.steps,
            "duration": None if duration is None else asdict(duration),
            "hours": None if duration is None else asdict(duration.whole.times(1 / 3600)),
            "gpu_hours": None if duration is None else asdict(duration.whole.times(ranks / 3600)),
            "assumed": list(machines.ASSUMED),
            "measured": None if self.measured is None else self.measured.model_dump(),
        }


def make_plan(
    recipe: Recipe,
    machine: Machine,
    nodes: int,
    gpus: int,
    images: int,
    classes: int,
    cores: int | None,
    rates: Measured | None,
    photos: Photos,
) -> Plan:
    """Plans a run on nodes with so many GPUs each. cores: of a node; None: not known. rates: measured ones; photos:
    those that it is trained on.

    Raises UserError for a run that does not fit, with the smallest change with which it does.
    """
    recipe = machines.on_machine(recipe, machine)
    search = FitSearch(recipe, machine, images, classes)
    fit = search.best(recipe, nodes * gpus)
    if fit.memory.total > fit.limit:
        way_out = ways_out(search, recipe, nodes, gpus)
        raise UserError(f"{fit.describe()}, and {machine.name} has {describe_bytes(fit.limit)}; {way_out}")
    step = search.step(fit.layout)
    stages = {zero: search.stage(fit, zero) for zero in (0, 1, 2)}
    step_time = estimate_time(recipe, step, fit.layout, fit.keep, nodes, machine, rates, cores, photos)
    steps = recipe.schedule.epochs * (images // recipe.data.batch)
    setting = Setting(recipe, machine, nodes, images, steps, cores, photos, rates)
    duration = estimate_duration(setting, step, fit.layout, step_time)
    return Plan(recipe, machine, nodes, fit, stages, step_time, steps, duration, rates)


def has_images(recipe: Recipe) -> bool:
    """Whether the training images are on this machine."""
    try:
        return count_images(recipe.data.train, "train") > 0
    except UserError:
        return False


def images_per_epoch(recipe: Recipe, images: int | None) -> int:
    """The images that an epoch trains on. images: of data.train; None: they are counted."""
    labels = recipe.data.labels
    if images is None:
        if not labels.all and recipe.data.unlabelled == "drop":
            return count_labelled(recipe.data.train, labels, recipe.data.order)
        return count_used(recipe.data.train, recipe.data.order)
    if recipe.data.unlabelled == "drop" and not labels.all:
        return max(1, round(labels.share * images))
    return images


def machine_memory() -> int:
    """Bytes of memory that are free on this machine."""
    import torch

    from kilobatch.trainer.costs import memory_probe

    return memory_probe.free_memory(torch.device("cpu"), 1)
