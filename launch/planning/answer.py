"""Answers whether a run's step fits into this machine's memory:
`python -m kilobatch.launch.planning.answer RUN REQUEST DATA`, the last two in JSON.

Writes an Answer as a line of JSON, and once more, with the way out, where that takes longer to find. Writes nothing
where there is no answer. It is a process of its own, since a step on fake tensors changes torch for a whole process.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kilobatch.data.beton import verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.files import describe_bytes
from kilobatch.launch.planning.fit import FitSearch, ways_out
from kilobatch.launch.planning.machines import FRAGMENTS, RESERVED, Machine, find_machine, on_machine
from kilobatch.launch.planning.memory import ASSUMED_PART, waiting_bytes
from kilobatch.launch.recipes.data import PreparedData
from kilobatch.launch.recipes.recipe import Recipe, load_recipe
from kilobatch.trainer.ranks.garbage import collect_from_now_on

NICENESS = 5  # below the workers, which start meanwhile; not so low that they fill the memory before there is an answer
# A plan counts at most 1.06 times less than was measured on CPUs, and never more (docs/plan.md); on GPUs it was not
# measured. It has to exceed the memory by these before a run is refused, so that none is which would have trained.
TOLERANCE = {"cpu": 1.1, "cuda": 1.25}
# A worker on a CPU holds more than a plan counts: 0.4 GiB of Python and libraries, and up to twice the plan, as blocks
# are kept for the next step (docs/plan.md). A way out is to fit with that, too.
BASE, SHARE = 2**29, 0.45


class Request(BaseModel):
    """What is asked. workers: of this machine; has: bytes of memory for each of them, on a CPU; other_nodes: more nodes
    can be had; killed: this run was killed for want of memory, so that a way out is wanted in any case; goes_on: from a
    checkpoint, which fits no other batch."""

    model_config = ConfigDict(frozen=True)

    workers: int
    nodes: int
    has: int
    other_nodes: bool
    killed: bool = False
    goes_on: bool = False


class Answer(BaseModel):
    """needs: bytes of a worker at their most, by the plan; has: of this machine for it; gpu: that is a GPU's own
    memory; step: what needs it, in words; way_out: a change with which it fits, in words; None: not found yet."""

    model_config = ConfigDict(frozen=True)

    needs: int
    has: int
    fits: bool
    gpu: bool
    step: str
    way_out: str | None = None

    def describe(self, workers: int) -> str:
        here = f"a GPU of this machine has {describe_bytes(self.has)}"
        if not self.gpu:
            here = f"this machine has {describe_bytes(self.has * workers)} free"
            here += f", {describe_bytes(self.has)} for each of {workers} workers" if workers > 1 else ""
        return f"this run cannot fit into memory: {self.step}, and {here}"


def answers(recipe: Recipe, request: Request, images: int, classes: int, gpu: int | None) -> Iterator[Answer]:
    """Yields the answer, and again with the way out. gpu: bytes of memory of a GPU; None: the workers use a CPU.

    Raises UserError where the method refuses the number of ranks or samples.
    """
    has = request.has if gpu is None else gpu
    machine = find_machine("cpu") if gpu is None else find_machine("a100")
    recipe = on_machine(recipe, machine)
    search = FitSearch(recipe, machine, images, classes)
    search.machine = replace(machine, memory=_most(recipe, request, machine, has))
    fit = search.best(recipe, request.nodes * request.workers)
    parts = {label: size for label, size in fit.memory.parts.items() if label != ASSUMED_PART}
    counted = replace(fit, memory=replace(fit.memory, parts=parts))
    needs = counted.memory.total
    answer = Answer(needs=needs, has=has, fits=fit.fits, gpu=gpu is not None, step=counted.describe())
    yield answer
    if not fit.fits or request.killed:
        limit = has if gpu is not None else max(int(SHARE * (has - BASE)), has // 4)
        search.machine = replace(machine, memory=min(limit, int(0.8 * needs)))
        may = {"other_nodes": request.other_nodes, "other_batch": not request.goes_on}
        way_out = ways_out(search, recipe, request.nodes, request.workers, **may)
        yield answer.model_copy(update={"way_out": way_out})


def _most(recipe: Recipe, request: Request, machine: Machine, has: int) -> int:
    """The bytes that a plan has to exceed before its run is refused.

    Batches that wait are left out, as a slow loader has none; so is what a plan assumes of a GPU.
    """
    samples = recipe.data.batch // (request.nodes * request.workers)
    waiting = waiting_bytes(samples, recipe.data.groups, machine)
    if machine.bandwidth is None:
        return int(TOLERANCE["cpu"] * has) + waiting
    return int((TOLERANCE["cuda"] * has + waiting + RESERVED) / (1 - FRAGMENTS))


def gpu_memory() -> int | None:
    """Bytes of the largest GPU's memory, by nvidia-smi, which takes none of it and needs no GPU for itself; None: there
    is no such program, or it does not answer."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    asked = subprocess.run(query, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    numbers = [int(line) for line in asked.stdout.splitlines() if line.strip().isdecimal()]
    return max(numbers) * 2**20 if asked.returncode == 0 and numbers else None


def main() -> None:
    os.nice(NICENESS)
    if (group := Path("/proc/self/autogroup")).exists():  # where sessions share the cores, its nice counts alone
        group.write_text(str(NICENESS))
    Path("/proc/self/oom_score_adj").write_text("1000")  # rather this process is killed than a worker
    folder, request, data = Path(sys.argv[1]), *sys.argv[2:]
    recipe, _ = load_recipe(folder / "recipe.yaml")
    from torch._subclasses import fake_tensor

    from kilobatch.launch.worker.devices import pick_device

    collect_from_now_on()
    gpu = None
    if pick_device(recipe.run.device, 0).type == "cuda" and (gpu := gpu_memory()) is None:
        return
    train = verify_beton(PreparedData.model_validate_json(data).train.beton)
    # What a method needs data for has no size beforehand; and what it refuses, the workers will refuse.
    unknown = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException, UserError)
    unknown += (fake_tensor.UnsupportedOperatorException, fake_tensor.UnsupportedFakeTensorException)
    with suppress(*unknown):
        for answer in answers(recipe, Request.model_validate_json(request), train.samples, len(train.classes), gpu):
            print(answer.model_dump_json(), flush=True)


if __name__ == "__main__":
    main()
