"""`kilobatch plan`: what a run will hold, send and take on machines that need not be there. Takes no memory itself.

What imports torch stands in the functions that need it, so that a bad recipe is refused before it is loaded.
"""

from dataclasses import asdict, dataclass
from typing import Any

from kilobatch.data.errors import Refusal
from kilobatch.data.loading.labels import count_labelled
from kilobatch.data.sources.specs import count
from kilobatch.launch.planning import machines as planning_machines
from kilobatch.launch.planning.fit import Fit, Fitting, ways_out
from kilobatch.launch.planning.machines import Machine, Measured
from kilobatch.launch.planning.step_time import Time, time
from kilobatch.launch.recipes.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """steps: from the recipe's start to its end; stages: bytes of optimizer and ZeRO, and the total, by ZeRO stage."""

    recipe: Recipe
    machine: Machine
    nodes: int
    fit: Fit
    stages: dict[int, tuple[int, int]]
    time: Time
    steps: int
    measured: Measured | None

    @property
    def seconds(self) -> float | None:
        return None if self.time.step is None else self.time.step * self.steps

    def as_json(self) -> dict[str, Any]:
        seconds, ranks = self.seconds, self.fit.layout.ranks
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
            "days": None if seconds is None else seconds / 86_400,
            "gpu_hours": None if seconds is None else seconds / 3600 * ranks,
            "assumed": list(planning_machines.ASSUMED),
            "measured": None if self.measured is None else self.measured.model_dump(),
        }


def make_plan(
    chosen: Recipe,
    machine: Machine,
    nodes: int,
    gpus: int,
    images: int,
    classes: int,
    cores: int | None,
    rates: Measured | None,
) -> Plan:
    fitting = Fitting(chosen, machine, images, classes)
    fit = fitting.best(chosen, nodes * gpus)
    if fit.memory.total > fit.limit:
        way_out = ways_out(fitting, chosen, nodes, gpus)
        raise Refusal(f"{fit.words()}, and {machine.name} has {planning_machines.words(fit.limit)}; {way_out}")
    step = fitting.step(fit.layout)
    stages = {zero: fitting.stage(fit, zero) for zero in (0, 1, 2)}
    took = time(chosen, step, fit.layout, fit.keep, nodes, machine, rates, cores)
    steps = chosen.schedule.epochs * (images // chosen.data.batch)
    return Plan(chosen, machine, nodes, fit, stages, took, steps, rates)


def has_images(chosen: Recipe) -> bool:
    """Whether the training images are on this machine."""
    try:
        return count(chosen.data.train, "train") > 0
    except Refusal:
        return False


def images_per_epoch(chosen: Recipe, images: int | None) -> int:
    """Images of an epoch."""
    labels = chosen.data.labels
    if images is None:
        images = count(chosen.data.train, "train")
        if not labels.all and chosen.data.unlabelled == "drop":
            return count_labelled(chosen.data.train, labels)
        return images
    if chosen.data.unlabelled == "drop" and not labels.all:
        return max(1, round(labels.share * images))
    return images


def free_memory() -> int:
    """Bytes that are free here."""
    import torch

    from kilobatch.trainer.costs.memory_probe import free

    return free(torch.device("cpu"), 1)
