"""Estimates the seconds of a step (compute, communication, loader) and the bytes of its collectives. Loads no torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kilobatch.launch.planning.machines import FLOP_PER_BYTE, HOPS, LINK_SHARE, Machine, Measured
from kilobatch.launch.planning.photos import Photos
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.trainer.costs import collective_time
from kilobatch.trainer.costs.collective_time import Kind, Link
from kilobatch.trainer.costs.zero_memory import ALL_REDUCE, BUCKET, FP32

if TYPE_CHECKING:
    from kilobatch.launch.planning.fake_step import Step, StepLayout

PURPOSES = {"targets": "targets", "BatchNorm": "BatchNorm's statistics", "loss": "embeddings and sums"}


@dataclass(frozen=True)
class Collective:
    """A collective's calls in a step. sent: bytes that one rank sends; seconds: None where no rate is known."""

    purpose: str
    kind: str
    calls: int
    sent: int
    seconds: float | None


@dataclass(frozen=True)
class Time:
    """Seconds of a step and of its parts; None: not known. cores: of a node, which the loader keeps busy; flops: of a
    rank."""

    compute: float | None
    communication: float | None
    loader: float | None
    step: float | None
    cores: float | None
    flops: int
    collectives: list[Collective]

    @property
    def binds(self) -> str | None:
        """The part that a step waits for most: loader, compute or communication."""
        known = {"compute": self.compute, "communication": self.communication, "loader": self.loader}
        if self.compute is None or self.communication is None:
            return None
        if self.loader is not None and self.loader > self.compute + self.communication:
            return "loader"
        return max(("compute", "communication"), key=lambda name: known[name] or 0)


def estimate_time(
    recipe: Recipe,
    step: "Step",
    layout: "StepLayout",
    keep: int,
    nodes: int,
    machine: Machine,
    measured: Measured | None,
    cores: int | None,
    photos: Photos,
) -> Time:
    """Estimates the time of a step. cores: of a node; None: not known, so that the loader's time is left out, and only
    the number of cores that it needs is given; photos: those that the loader decodes."""
    collectives = list(_collectives(recipe, step, layout, nodes, machine, measured))
    flops = step.flops(layout, keep)
    rate = rate_of(recipe, machine, measured, layout.ranks // nodes)
    compute = flops / rate if rate else None
    seconds = [collective.seconds for collective in collectives]
    communication = None if None in seconds else sum(s for s in seconds if s is not None)
    of_image = photos.seconds(recipe.data.groups, machine.bandwidth is not None, measured)
    work = layout.samples * layout.ranks / nodes * of_image  # core-seconds of a node
    loader = work / cores if cores else None
    if compute is None or communication is None:
        return Time(compute, communication, loader, None, None, flops, collectives)
    whole = max(compute + communication, loader or 0)
    return Time(compute, communication, loader, whole, work / whole, flops, collectives)


def rate_of(recipe: Recipe, machine: Machine, measured: Measured | None, node: int) -> float | None:
    """Floating-point operations a second of a rank, at best; None: not known. node: ranks of a node, which share the
    cores of a CPU."""
    if measured is not None:
        return measured.flops / (node if machine.bandwidth is None else 1)
    return None if machine.bandwidth is None else FLOP_PER_BYTE[recipe.engine.precision] * machine.bandwidth


def _collectives(
    recipe: Recipe, step: "Step", layout: "StepLayout", nodes: int, machine: Machine, measured: Measured | None
) -> Iterator[Collective]:
    """Yields the collectives of a step: the method's, then the engine's."""
    ranks, zero = layout.ranks, recipe.engine.zero
    if ranks == 1:
        return
    link = _link(machine, ranks // nodes, nodes, measured)

    def collective(purpose: str, kind: Kind, calls: int, whole: float) -> Collective:
        duration = calls * collective_time.seconds(kind, round(whole / calls), ranks, link) if link else None
        return Collective(
            purpose, kind.replace("_", "-"), calls, round(collective_time.sent(kind, round(whole), ranks)), duration
        )

    for (purpose, kind), calls in step.sent.calls.items():
        # The fake step computed one chunk.
        times = layout.chunks if purpose in ("targets", "BatchNorm") else 1
        yield collective(PURPOSES.get(purpose, purpose), kind, times * calls, times * step.sent.whole[purpose, kind])
    gradients = FP32 * step.trained
    if zero == 0:
        yield collective("gradients", "all_reduce", math.ceil(step.trained / ALL_REDUCE), gradients)
    else:
        # DeepSpeed averages buckets of all ranks' parts by all-reduce; at stage 2 after each backward.
        times = layout.chunks if zero == 2 else 1
        yield collective("gradients", "all_reduce", times * math.ceil(step.trained / BUCKET), times * gradients)
        yield collective("weights after the update", "all_gather", len(step.groups), gradients)
        if recipe.optimizer.name == "lars":
            yield collective("LARS's norms", "all_reduce", 1, 2 * FP32 * step.tensors)
        if recipe.engine.clip and recipe.engine.clip_by == "tensor":
            yield collective("clipping's norms", "all_reduce", len(step.groups), 2 * FP32 * step.tensors)
    yield collective("finite, stop, checkpoint", "all_reduce", 1, 8 * (2 * ranks + 2))


def _link(machine: Machine, node: int, nodes: int, measured: Measured | None) -> Link | None:
    """The link between ranks; None where its rates are not known."""
    if measured and measured.link and measured.latency and nodes == 1:
        return Link("measured", node, measured.link, measured.latency, measured.link, measured.latency)
    if machine.inside is None or machine.between is None:
        return None
    return Link(machine.name, node, LINK_SHARE * machine.inside, HOPS[0], LINK_SHARE * machine.between, HOPS[1])
