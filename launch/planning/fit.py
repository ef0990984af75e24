"""Finds out whether a recipe's step fits into a device's memory, and the smallest change with which it does."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kilobatch.data.files import describe_bytes
from kilobatch.launch.planning.machines import Machine
from kilobatch.launch.planning.memory import MemoryPeak, optimizer_bytes, peak_memory
from kilobatch.launch.recipes.recipe import Recipe

if TYPE_CHECKING:
    from kilobatch.launch.planning.fake_step import Step, StepLayout

MOST_NODES = 64  # times as many nodes as the user named are tried, at most


@dataclass(frozen=True)
class Fit:
    """The memory of a step in one layout. keep: chunks that keep their graph; zero: ZeRO's stage; limit: bytes of the
    device."""

    layout: "StepLayout"
    keep: int
    zero: int
    memory: MemoryPeak
    limit: int

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit

    def describe(self) -> str:
        largest = sorted(self.memory.parts.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{label} {describe_bytes(size)}" for label, size in largest)
        chunks = f" in {self.layout.chunks} chunks" if self.layout.chunks > 1 else ""
        return (
            f"{self.layout.samples} images a rank{chunks} need {describe_bytes(self.memory.total)} ({parts}) at their "
            f"most, in the {self.memory.moment}"
        )


class FitSearch:
    """Searches the layouts of a recipe's step for those that fit; each layout is run once."""

    def __init__(self, recipe: Recipe, machine: Machine, images: int, classes: int) -> None:
        self.recipe, self.machine, self.images, self.classes = recipe, machine, images, classes
        self._steps: dict[StepLayout, Step] = {}

    def step(self, layout: "StepLayout") -> "Step":
        """The fake step in this layout."""
        if layout not in self._steps:
            from kilobatch.launch.planning import fake_step

            self._steps[layout] = fake_step.run_fake_step(self.recipe, layout, self.images, self.classes)
        return self._steps[layout]

    def fit(self, recipe: Recipe, ranks: int, samples: int, chunks: int, zero: int) -> Fit:
        """The memory in this layout, with as many kept graphs as the recipe says or, where it says auto, as fit."""
        from kilobatch.launch.planning.fake_step import StepLayout

        layout = StepLayout(ranks, samples, chunks)
        step, wanted = self.step(layout), recipe.engine.keep
        keeps = range(chunks, -1, -1) if wanted == "auto" else [min(wanted, chunks)]
        assert self.machine.memory is not None
        from kilobatch.trainer.chunking import SHARE

        found = None
        for keep in keeps if chunks > 1 else [1]:
            held = peak_memory(step, layout, keep, zero, recipe.data.views, self.machine)
            found = Fit(layout, keep, zero, held, self.machine.memory)
            if held.total <= self.machine.memory * (SHARE if chunks > 1 and wanted == "auto" and keep else 1):
                return found
        assert found is not None
        return found

    def best(self, recipe: Recipe, ranks: int) -> Fit:
        """The layout that the recipe says; where engine.chunks is auto, in the fewest chunks that fit."""
        samples, zero, chunks = recipe.data.batch // ranks, recipe.engine.zero, recipe.engine.chunks
        first = self.fit(recipe, ranks, samples, 1 if chunks == "auto" else chunks, zero)
        return first if first.fits or chunks != "auto" else next(self.chunked(first, recipe, zero), first)

    def chunked(self, fit: Fit, recipe: Recipe, zero: int) -> Iterator[Fit]:
        """Yields the layouts in more chunks that fit, the fewest first; none where a norm or the method needs the whole
        batch."""
        samples, layout = fit.layout.samples, fit.layout
        if not self.step(layout).in_chunks:
            return
        smallest = self.fit(recipe, layout.ranks, samples, samples, zero)
        if not smallest.fits:
            return
        for chunks in range(layout.chunks + 1, samples + 1):
            if samples % chunks == 0 and self._likely(fit, smallest, chunks):
                found = self.fit(recipe, layout.ranks, samples, chunks, zero)
                if found.fits:
                    yield found

    def _likely(self, fit: Fit, smallest: Fit, chunks: int) -> bool:
        """Whether so many chunks may fit: between the two layouts memory is about linear in a chunk's samples, so that
        most numbers of chunks need no run."""
        n, size = fit.layout.samples, fit.layout.samples // chunks
        slope = (fit.memory.total - smallest.memory.total) / max(1, n // fit.layout.chunks - 1)
        return smallest.memory.total + slope * (size - 1) <= 1.05 * fit.limit

    def stage(self, fit: Fit, zero: int) -> tuple[int, int]:
        """Bytes of the optimizer with the copies that ZeRO keeps, and of all memory, at this stage of ZeRO."""
        step = self.step(fit.layout)
        held = peak_memory(step, fit.layout, fit.keep, zero, self.recipe.data.views, self.machine)
        return optimizer_bytes(step, fit.layout, zero), held.total


def ways_out(search: FitSearch, recipe: Recipe, nodes: int, gpus: int) -> str:
    """The first of these changes with which the step fits, in words: more chunks, ZeRO, fewer images, more nodes."""
    ranks, zero = nodes * gpus, recipe.engine.zero
    fit = search.best(recipe, ranks)
    layout = fit.layout
    stages = [z for z in (1, 2) if z > zero and ranks > 1 and recipe.optimizer.name != "lamb"]
    whole = search.step(layout).in_chunks
    for found in search.chunked(fit, recipe, zero):
        return f"use engine.chunks={found.layout.chunks} ({describe_bytes(found.memory.total)})"
    for stage in stages:
        found = search.fit(recipe, ranks, layout.samples, layout.chunks, stage)
        if found.fits:
            return f"use engine.zero={stage} ({describe_bytes(found.memory.total)})"
    for stage in stages:
        for found in search.chunked(fit, recipe, stage):
            return f"use engine.zero={stage} engine.chunks={found.layout.chunks} ({describe_bytes(found.memory.total)})"
    why = "" if whole else "it cannot be computed in chunks (encoder.norm=local and no method.shuffle could); "
    samples = layout.samples
    while samples > 1:
        samples //= 2
        if samples * ranks >= 2 and samples % layout.chunks == 0:
            found = search.fit(recipe, ranks, samples, layout.chunks, zero)
            if found.fits:
                return f"{why}use data.batch={samples * ranks} ({describe_bytes(found.memory.total)})"
    times = 2
    while times <= MOST_NODES and recipe.data.batch % (ranks * times * layout.chunks) == 0:
        found = search.fit(recipe, ranks * times, layout.samples // times, layout.chunks, zero)
        if found.fits:
            return f"{why}use --nodes {nodes * times} ({describe_bytes(found.memory.total)})"
        times *= 2
    return f"{why}neither more chunks, ZeRO, fewer images nor {MOST_NODES} times the nodes make it fit; use larger GPUs"
