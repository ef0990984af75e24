"""`kilobatch init`: writes a recipe for one's own images, whose lines say why each option is as it is.

Loads torch only where it has to be found out whether a step fits into memory.
"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from kilobatch.data.errors import UserError
from kilobatch.data.files import describe_bytes, refusing_os_errors, write_whole
from kilobatch.data.sources.path_names import printable
from kilobatch.data.sources.specs import path_of
from kilobatch.data.sources.splits import split_folders
from kilobatch.launch.cli.choices import Choice, Choices, Place, as_recipe, choose, recipe_to_extend
from kilobatch.launch.cli.survey import Survey, survey
from kilobatch.launch.planning.answer import BASE, SHARE, Request, gpu_memory
from kilobatch.launch.planning.fit import Fit, FitSearch, ways_out
from kilobatch.launch.planning.machines import Machine, find_machine, on_machine, ranks_per_node
from kilobatch.launch.planning.question import is_small
from kilobatch.launch.processes.output import tell
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.data import with_absolute_paths
from kilobatch.launch.recipes.recipe import Recipe, resolve_recipe
from kilobatch.launch.recipes.settings import format_value, parse
from kilobatch.trainer.costs import machine_memory

LEAST = 8  # images of a worker: two steps an epoch, each with three others to tell an image from
OWN_GPU = "a GPU of this machine"
LINE = 120  # characters; a longer reason stands above its option
PLAIN = re.compile(r"[A-Za-z0-9_./:~-]+")  # text that YAML needs no quotes for, if it reads back


def init(
    spec: str, method: str, out: Path | None, gpu: str | None, gpus: int | None, workers: int | None, force: bool
) -> None:
    """Writes a recipe for the images of `spec`, and says what was found. gpus, workers: of the machine.

    Raises UserError where the images cannot be read, where no batch fits, and for a file that exists, without force.
    """
    if out is not None:
        _check_out(out, force)
    recipe_to_extend(method, 0)  # refuses a wrong method before images are read
    machine, place = _machine(gpu, gpus, workers)
    seen = survey(spec)
    if seen.images < LEAST * place.workers:
        each = f", {LEAST} for each of {place.workers} workers" if place.workers > 1 else ""
        raise UserError(f"{spec} has {seen.images:,} images; init needs {LEAST * place.workers} or more{each}")
    if out is None:
        out = Path(f"{_name(seen)}.yaml")
        _check_out(out, force)
    base = recipe_to_extend(method, seen.side)
    chosen = _fitting(seen, machine, place, base)
    recipe, settings = as_recipe(chosen)
    check(with_absolute_paths(recipe), place.workers, settings)
    text = render(chosen, seen, place, method, out)
    with refusing_os_errors(out):
        write_whole(out, [text.encode()])
    _report(seen, place, recipe, base, out)


def _check_out(out: Path, force: bool) -> None:
    shown = printable(str(out))
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out is {shown}; a recipe is a .yaml file")
    if not out.parent.is_dir():
        raise UserError(f"--out is {shown}, and there is no folder {printable(str(out.parent))}; make it first")
    if out.is_dir():
        raise UserError(f"{shown} is a folder; name another file by --out")
    if out.exists() and not force:
        raise UserError(f"{shown} exists; --force overwrites it, --out FILE.yaml writes another")


def _name(seen: Survey) -> str:
    """The name of the recipe's file: that of the images' file or folder, of the folder above for a split."""
    path = path_of(seen.train)
    if path is None:
        return seen.train
    name = path.name if path.is_dir() else path.stem
    if split_folders([name]):
        name = path.parent.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("._-") or "own"


def _machine(gpu: str | None, gpus: int | None, workers: int | None) -> tuple[Machine, Place]:
    """The machine that is named, or this one; the memory of a CPU is what a worker can hold besides Python."""
    if gpu not in (None, "cpu"):
        machine = find_machine(gpu)
        return machine, Place(gpu, ranks_per_node(f"--gpu is {gpu}", False, gpus, workers) or 1, cpu=False)
    memory = gpu_memory() if gpu is None else None
    if memory is not None:
        import torch

        count = ranks_per_node("this machine has GPUs", False, gpus, workers) or max(1, torch.cuda.device_count())
        return replace(find_machine("a100"), name="this machine's GPU", memory=memory), Place(OWN_GPU, count, cpu=False)
    where = "this machine has no GPU" if gpu is None else "--gpu is cpu"
    workers = ranks_per_node(where, True, gpus, workers) or 1
    has = machine_memory.most_per_worker(workers)
    limit = max(int(SHARE * (has - BASE)), has // 4)
    return replace(find_machine("cpu"), memory=limit), Place("this machine", workers, cpu=True)


def _fitting(seen: Survey, machine: Machine, place: Place, base_name: str) -> Choices:
    """The options, with the most images in the fewest chunks that fit into memory. Raises UserError where none fit."""
    base = resolve_recipe(base_name, [])
    chosen = choose(seen, place, base_name, base, None, 1)
    recipe, _ = as_recipe(chosen)
    assert machine.memory is not None
    request = Request(workers=place.workers, nodes=1, has=machine.memory, other_nodes=False)
    if place.cpu and is_small(recipe, request):
        return chosen
    tell(f"finding what fits into the memory of {place.name}, by a step of {recipe.encoder.name} without its pixels")
    recipe = on_machine(recipe, machine)
    search = FitSearch(recipe, machine, seen.images, seen.classes)
    fit = search.best(recipe, place.workers)
    if fit.fits:
        return chosen
    found: Fit | None = next(search.chunked(fit, recipe, recipe.engine.zero), None)
    found = found or next(search.fewer_images(fit, recipe, recipe.engine.zero), None)
    if found is None:
        way_out = ways_out(search, recipe, 1, place.workers, other_nodes=False)
        raise UserError(f"{fit.describe()}, and {place.name} has {describe_bytes(fit.limit)} for it; {way_out}")
    batch = found.layout.samples * place.workers
    return choose(seen, place, base_name, base, None if batch == recipe.data.batch else batch, found.layout.chunks)


def render(chosen: Choices, seen: Survey, place: Place, method: str, out: Path) -> str:
    """The text of the recipe's file."""
    shown = printable(str(out))
    many = f" --workers {place.workers}" if place.workers > 1 else ""
    labels = f"{seen.classes:,} classes" if seen.classes > 1 else "no labels"
    lines = [
        f"# {method} on {seen.images:,} images of about {seen.side} pixels, {labels}. Written by kilobatch init.",
        f"# kilobatch train {shown} run.name=first{many}",
        f"# {_plan_command(place, shown)} predicts memory and time; kilobatch options lists all that can be set here.",
        "",
    ]
    tree: dict[str, Any] = {}
    for key, choice in chosen.items():
        *sections, last = key.split(".")
        into = tree
        for section in sections:
            into = into.setdefault(section, {})
        into[last] = choice
    for name, value in tree.items():
        lines += [*_lines(name, value, ""), ""]
    return "\n".join(lines[:-1]) + "\n"


def _plan_command(place: Place, file: str) -> str:
    """The command that plans a training of the recipe on the machine that it is for."""
    gpu = "" if place.cpu or place.name == OWN_GPU else f" --gpu {shlex.quote(place.name)}"
    many = f" --{'workers' if place.cpu else 'gpus'}-per-node {place.workers}" if place.workers > 1 else ""
    return f"kilobatch plan {file}{gpu}{many}"


def _lines(name: str, value: "dict[str, Any] | Choice", indent: str) -> list[str]:
    if isinstance(value, dict):
        return [
            f"{indent}{name}:",
            *(line for key, inner in value.items() for line in _lines(key, inner, f"{indent}  ")),
        ]
    if isinstance(value.value, list) and any(isinstance(item, dict) for item in value.value):
        items = [f"{indent}  - {json.dumps(item)}" for item in value.value]
        return [*([f"{indent}# {printable(value.reason)}"] if value.reason else []), f"{indent}{name}:", *items]
    text = f"{indent}{name}: {_scalar(value.value)}"
    if not value.reason:
        return [text]
    reason = f"# {printable(value.reason)}"
    return [f"{text} {reason}"] if len(text) + len(reason) < LINE else [f"{indent}{reason}", text]


def _scalar(value: Any) -> str:
    """A value as YAML on one line, of any length."""
    if not isinstance(value, str):
        return format_value(value)
    plain = PLAIN.fullmatch(value) and parse(f"a: {value}", "")[0] == {"a": value}
    return value if plain else json.dumps(value, ensure_ascii=not value.isprintable())


def _report(seen: Survey, place: Place, recipe: Recipe, base: str, out: Path) -> None:
    labels = f"{seen.classes:,} classes" if seen.classes > 1 else "no labels"
    print(f"images: {seen.images:,} of about {seen.side} pixels, {labels} ({printable(seen.train)})")
    if seen.passed_over:
        print(f"passed over: {seen.passed_over}")
    test = f"{seen.test_images:,} ({printable(seen.test)})" if seen.test else f"none: {printable(seen.no_test)}"
    print(f"test images: {test}")
    many = f" --workers {place.workers}" if place.workers > 1 else ""
    epochs, steps = recipe.schedule.epochs, seen.images // recipe.data.batch
    shown = printable(str(out))
    print(
        f"wrote {shown}: {base} with {recipe.encoder.name}, views of {recipe.data.groups[0].size} pixels, batch "
        f"{recipe.data.batch}, {epochs:,} epochs of {steps:,} steps"
    )
    print(f"how long: {_plan_command(place, shown)}")
    print(f"next: kilobatch train {shown} run.name=first{many}")
