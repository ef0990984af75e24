"""Finds out whether a recipe's step fits into a device's memory, and the smallest change with which it does."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kilobatch.data.files import describe_bytes
from kilobatch.launch.planning.machines import Machine
from kilobatch.launch.planning.memory import MemoryPeak, optimizer_bytes, peak_memory
from kilobatch.launch.recipes.data import needed_fields
from kilobatch.launch.recipes.recipe import Recipe

if TYPE_CHECKING:
    from kilobatch.launch.planning.fake_step import Step, StepLayout

LEAST_NORM = 16  # images of a chunk whose own BatchNorm statistics may be proposed in place of those of the whole batch
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
    """Searches the layouts of a recipe's step for those that fit; each layout is run once.

    Raises UserError where the method reads fields and the data that state their shapes are not there.
    """

    def __init__(self, recipe: Recipe, machine: Machine, images: int, classes: int) -> None:
        self.recipe, self.machine, self.images, self.classes = recipe, machine, images, classes
        self.fields = needed_fields(recipe)
        self._steps: dict[StepLayout, Step] = {}

    def step(self, layout: "StepLayout") -> "Step":
        """The fake step in this layout."""
        if layout not in self._steps:
            from kilobatch.launch.planning import fake_step

            facts = self.images, self.classes, self.fields
            self._steps[layout] = fake_step.run_fake_step(self.recipe, layout, *facts)
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
            held = peak_memory(step, layout, keep, zero, recipe.data.groups, self.machine)
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
            if samples % chunks == 0 and _likely(fit, smallest, samples // chunks):
                found = self.fit(recipe, layout.ranks, samples, chunks, zero)
                if found.fits:
                    yield found

    def fewer_images(self, fit: Fit, recipe: Recipe, zero: int) -> Iterator[Fit]:
        """Yields the layouts with fewer images, halved again and again, that fit; the most first."""
        layout, halves = fit.layout, [fit.layout.samples // 2]
        while halves[-1] > 1:
            halves.append(halves[-1] // 2)
        halves = [n for n in halves if n * layout.ranks >= 2 and n % layout.chunks == 0]
        if not halves:
            return
        smallest = self.fit(recipe, layout.ranks, halves[-1], layout.chunks, zero)
        for samples in halves:
            if _likely(fit, smallest, samples // layout.chunks):
                found = self.fit(recipe, layout.ranks, samples, layout.chunks, zero)
                if found.fits:
                    yield found

    def stage(self, fit: Fit, zero: int) -> tuple[int, int]:
        """Bytes of the optimizer with the copies that ZeRO keeps, and of all memory, at this stage of ZeRO."""
        step = self.step(fit.layout)
        held = peak_memory(step, fit.layout, fit.keep, zero, self.recipe.data.groups, self.machine)
        return optimizer_bytes(step, fit.layout, zero), held.total


def _likely(fit: Fit, smallest: Fit, size: int) -> bool:
    """Whether chunks of so many samples may fit: between the two layouts memory is about linear in a chunk's samples,
    so that most sizes need no run."""
    most, least = (one.layout.samples // one.layout.chunks for one in (fit, smallest))
    slope = (fit.memory.total - smallest.memory.total) / max(1, most - least)
    return smallest.memory.total + slope * (size - least) <= 1.05 * smallest.limit


def ways_out(
    search: FitSearch, recipe: Recipe, nodes: int, gpus: int, *, other_nodes: bool = True, other_batch: bool = True
) -> str:
    """The first of these changes with which the step fits, in words, with what it costs: more chunks, ZeRO, both, the
    norm of a chunk, fewer images, where it may be an other_batch, more nodes, where other_nodes can be had."""
    ranks, zero = nodes * gpus, recipe.engine.zero
    fit = search.best(recipe, ranks)
    layout = fit.layout
    stages = [z for z in (1, 2) if z > zero and ranks > 1 and recipe.optimizer.name != "lamb"]
    whole = search.step(layout).in_chunks
    for found in search.chunked(fit, recipe, zero):
        return f"use engine.chunks={found.layout.chunks} ({_cost(search, found)})"
    for stage in stages:
        found = search.fit(recipe, ranks, layout.samples, layout.chunks, stage)
        if found.fits:
            return f"use engine.zero={stage} ({describe_bytes(found.memory.total)})"
    for stage in stages:
        for found in search.chunked(fit, recipe, stage):
            return f"use engine.zero={stage} engine.chunks={found.layout.chunks} ({_cost(search, found)})"
    local, why = ("", "") if whole else _with_local_norm(search, recipe, fit)
    why = f"{local}; or, with the norm as it is, " if local else why
    for found in search.fewer_images(fit, recipe, zero) if other_batch else ():
        return f"{why}use data.batch={found.layout.samples * ranks} ({describe_bytes(found.memory.total)})"
    if local:
        return local
    if not other_nodes and not other_batch:
        return (
            f"{why}neither more chunks nor ZeRO make it fit, and its batch stays; resume it where there is more memory"
        )
    if not other_nodes:
        return f"{why}neither more chunks, ZeRO nor fewer images make it fit; use smaller views or a smaller encoder"
    times = 2
    while times <= MOST_NODES and recipe.data.batch % (ranks * times * layout.chunks) == 0:
        found = search.fit(recipe, ranks * times, layout.samples // times, layout.chunks, zero)
        if found.fits:
            return f"{why}use --nodes {nodes * times} ({describe_bytes(found.memory.total)})"
        times *= 2
    fewer = ", fewer images" if other_batch else ""
    return f"{why}neither more chunks, ZeRO{fewer} nor {MOST_NODES} times the nodes make it fit; use larger GPUs"


def _with_local_norm(search: FitSearch, recipe: Recipe, whole: Fit) -> tuple[str, str]:
    """The fewest chunks with which the step fits where BatchNorm sees a chunk alone, in words, with what that costs; or
    "", and why there are none, as the beginning of a sentence. whole: the step as it is. Methods that may shuffle are
    left out: in a chunk's own statistics queries and keys would know each other."""
    why = "it cannot be computed in chunks (encoder.norm=local and no method.shuffle could); "
    ranks, samples, zero = whole.layout.ranks, whole.layout.samples, whole.zero
    numbers = [n for n in range(2, samples // LEAST_NORM + 1) if samples % n == 0]
    if recipe.encoder.norm == "local" or hasattr(recipe.method, "shuffle") or not numbers:
        return "", why
    local = recipe.model_copy(update={"encoder": recipe.encoder.model_copy(update={"norm": "local"})})
    chunked = FitSearch(local, search.machine, search.images, search.classes)
    smallest = chunked.fit(local, ranks, samples, numbers[-1], zero)
    if not chunked.step(smallest.layout).in_chunks:
        return "", why
    if not smallest.fits:
        label, size = max(smallest.memory.parts.items(), key=lambda part: part[1])
        needs = f"{describe_bytes(smallest.memory.total)}, of which {label} {describe_bytes(size)}"
        few = samples // numbers[-1]
        return "", f"chunks do not help, as even {few} images at a time (with encoder.norm=local) need {needs}; "
    likely = (n for n in numbers if _likely(whole, smallest, samples // n))
    found = next((fit for n in likely if (fit := chunked.fit(local, ranks, samples, n, zero)).fits), smallest)
    chunks, size = found.layout.chunks, samples // found.layout.chunks
    return (
        f"use encoder.norm=local engine.chunks={chunks} ({_cost(chunked, found)}; BatchNorm then sees the {size} "
        f"images of a chunk, not all {recipe.data.batch:,}, which can change the result)"
    ), ""


def _cost(search: FitSearch, fit: Fit) -> str:
    """The bytes that a layout takes, and its time by its operations, as a multiple of that of a step in one piece."""
    step = search.step(fit.layout)
    times = step.flops(fit.layout, fit.keep) / step.flops(fit.layout, fit.layout.chunks)
    slower = f"about {times:.1f} times the time of a step" if times >= 1.05 else "a step takes about as long"
    return f"{describe_bytes(fit.memory.total)}, {slower}"
