"""Whether a recipe's step fits into a device's memory, and the smallest change with which it does."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kilobatch.launch.planning.machines import Machine, words
from kilobatch.launch.planning.memory import Memory, memory, optimizer
from kilobatch.launch.recipes.recipe import Recipe

if TYPE_CHECKING:
    from kilobatch.launch.planning.fake_step import Layout, Step

MOST_NODES = 64  # times as many as asked for, that are tried


@dataclass(frozen=True)
class Fit:
    layout: "Layout"
    keep: int
    zero: int
    memory: Memory
    limit: int

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.limit

    def words(self) -> str:
        largest = sorted(self.memory.parts.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{label} {words(size)}" for label, size in largest)
        chunks = f" in {self.layout.chunks} chunks" if self.layout.chunks > 1 else ""
        return (
            f"{self.layout.samples} images a rank{chunks} need {words(self.memory.total)} ({parts}) at their "
            f"most, in the {self.memory.moment}"
        )


class Fitting:
    """Steps of one recipe in several layouts, each looked at once."""

    def __init__(self, recipe: Recipe, machine: Machine, images: int, classes: int) -> None:
        self.recipe, self.machine, self.images, self.classes = recipe, machine, images, classes
        self._steps: dict[Layout, Step] = {}

    def step(self, layout: "Layout") -> "Step":
        if layout not in self._steps:
            from kilobatch.launch.planning import fake_step as planning_pass

            self._steps[layout] = planning_pass.step(self.recipe, layout, self.images, self.classes)
        return self._steps[layout]

    def fit(self, recipe: Recipe, ranks: int, samples: int, chunks: int, zero: int) -> Fit:
        """With as many kept graphs as the recipe says, or as fit."""
        from kilobatch.launch.planning.fake_step import Layout

        layout = Layout(ranks, samples, chunks)
        step, asked = self.step(layout), recipe.engine.keep
        keeps = range(chunks, -1, -1) if asked == "auto" else [min(asked, chunks)]
        assert self.machine.memory is not None
        from kilobatch.trainer.chunking import SHARE

        found = None
        for keep in keeps if chunks > 1 else [1]:
            held = memory(step, layout, keep, zero, recipe.data.views, self.machine)
            found = Fit(layout, keep, zero, held, self.machine.memory)
            if held.total <= self.machine.memory * (SHARE if chunks > 1 and asked == "auto" and keep else 1):
                return found
        assert found is not None
        return found

    def best(self, recipe: Recipe, ranks: int) -> Fit:
        """As the recipe says; with engine.chunks auto in the fewest chunks that fit."""
        samples, zero, asked = recipe.data.batch // ranks, recipe.engine.zero, recipe.engine.chunks
        first = self.fit(recipe, ranks, samples, 1 if asked == "auto" else asked, zero)
        return first if first.fits or asked != "auto" else next(self.chunked(first, recipe, zero), first)

    def chunked(self, fit: Fit, recipe: Recipe, zero: int) -> Iterator[Fit]:
        """What fits in more chunks, the fewest first; nothing where a norm or the method needs the whole batch."""
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
        """Between the two, memory is about linear in a chunk's samples."""
        n, size = fit.layout.samples, fit.layout.samples // chunks
        slope = (fit.memory.total - smallest.memory.total) / max(1, n // fit.layout.chunks - 1)
        return smallest.memory.total + slope * (size - 1) <= 1.05 * fit.limit

    def stage(self, fit: Fit, zero: int) -> tuple[int, int]:
        """Bytes of the optimizer with all that ZeRO adds, and in all, at this stage."""
        step = self.step(fit.layout)
        held = memory(step, fit.layout, fit.keep, zero, self.recipe.data.views, self.machine)
        return optimizer(step, fit.layout, zero), held.total


def ways_out(fitting: Fitting, recipe: Recipe, nodes: int, gpus: int) -> str:
    """The first change that fits, of: chunks, ZeRO, fewer images, more GPUs; in words."""
    ranks, zero = nodes * gpus, recipe.engine.zero
    fit = fitting.best(recipe, ranks)
    layout = fit.layout
    stages = [z for z in (1, 2) if z > zero and ranks > 1 and recipe.optimizer.name != "lamb"]
    whole = fitting.step(layout).in_chunks
    for found in fitting.chunked(fit, recipe, zero):
        return f"use engine.chunks={found.layout.chunks} ({words(found.memory.total)})"
    for stage in stages:
        found = fitting.fit(recipe, ranks, layout.samples, layout.chunks, stage)
        if found.fits:
            return f"use engine.zero={stage} ({words(found.memory.total)})"
    for stage in stages:
        for found in fitting.chunked(fit, recipe, stage):
            return f"use engine.zero={stage} engine.chunks={found.layout.chunks} ({words(found.memory.total)})"
    why = "" if whole else "it cannot be computed in chunks (encoder.norm=local and no method.shuffle could); "
    samples = layout.samples
    while samples > 1:
        samples //= 2
        if samples * ranks >= 2 and samples % layout.chunks == 0:
            found = fitting.fit(recipe, ranks, samples, layout.chunks, zero)
            if found.fits:
                return f"{why}use data.batch={samples * ranks} ({words(found.memory.total)})"
    times = 2
    while times <= MOST_NODES and recipe.data.batch % (ranks * times * layout.chunks) == 0:
        found = fitting.fit(recipe, ranks * times, layout.samples // times, layout.chunks, zero)
        if found.fits:
            return f"{why}use --nodes {nodes * times} ({words(found.memory.total)})"
        times *= 2
    return f"{why}neither more chunks, ZeRO, fewer images nor {MOST_NODES} times the nodes make it fit; use larger GPUs"
