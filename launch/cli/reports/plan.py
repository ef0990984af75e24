"""`kilobatch plan`: prints the plan of a recipe as a table or as JSON. Loads no torch before the recipe is read."""

import json
from dataclasses import replace
from pathlib import Path

from kilobatch.data.cpus import spare_threads
from kilobatch.data.errors import UserError
from kilobatch.launch.planning import machines
from kilobatch.launch.planning.machines import GIB
from kilobatch.launch.planning.own_rate import measure_own_rate
from kilobatch.launch.planning.photos import photos_of
from kilobatch.launch.planning.plan import has_images, images_per_epoch, machine_memory, make_plan
from kilobatch.launch.processes.output import tell
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.recipe import read_recipe
from kilobatch.trainer.ranks.phase import shown_with


def plan(
    name: str,
    overrides: list[str],
    *,
    nodes: int,
    gpus_per_node: int | None,
    workers_per_node: int | None,
    gpu: str,
    images: int | None,
    classes: int,
    cores: int | None,
    memory_gib: float | None,
    measured: Path | None,
    photo_side: int | None,
    as_json: bool,
) -> None:
    """Prints the plan of a recipe. Raises UserError for a recipe that is wrong, and for one that does not fit into
    memory: the message names the smallest change with which it does."""
    for option, value in (("nodes", nodes), ("classes", classes)):
        if value < 1:
            raise UserError(f"--{option} is {value}; it should be 1 or more")
    machine = machines.find_machine(gpu)
    cpu = machine.bandwidth is None
    ranks_per_node = machines.ranks_per_node(f"--gpu is {gpu}", cpu, gpus_per_node, workers_per_node) or 1
    if memory_gib is not None:
        machine = replace(machine, memory=int(memory_gib * GIB))
    rates = machines.read_measured(measured) if measured else machines.read_kept(machine)
    if rates and (rates.device == "cpu") != (machine.bandwidth is None):
        raise UserError(f"--measured {measured} is of {rates.device}, and --gpu is {gpu}; measure on such a machine")
    recipe, settings = read_recipe(name, overrides)
    try:
        check(recipe, nodes * ranks_per_node, settings, images=images)
    except UserError as error:
        if images is None and not has_images(recipe):
            raise UserError(f"{error}; to plan without the data, give --images, as 1281167 for ImageNet") from error
        raise
    if machine.memory is None:
        machine = replace(machine, memory=machine_memory() // ranks_per_node)
    if cores is None and machine.bandwidth is None:
        cores = spare_threads(1)
    if not as_json:
        count = nodes * ranks_per_node
        ranks = f"{count} {'rank' if count == 1 else 'ranks'}"
        tell(f"planning a step of {recipe.method.name}: {recipe.data.batch:,} images on {ranks}, without their pixels")
    if rates is None and machine.bandwidth is None and nodes * ranks_per_node == 1:
        rates = measure_own_rate(recipe)
    images, photos = images_per_epoch(recipe, images), photos_of(recipe, photo_side)
    with shown_with(None if as_json else tell):
        run_plan = make_plan(recipe, machine, nodes, ranks_per_node, images, classes, cores, rates, photos)
    if as_json:
        print(json.dumps(run_plan.as_json(), indent=2))
    else:
        from kilobatch.launch.planning import table

        table.print_plan(run_plan)
