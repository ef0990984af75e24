"""`kilobatch plan`: prints the plan of a recipe as a table or as JSON. Loads no torch before the recipe is read."""

import json
from dataclasses import replace
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.launch.planning import machines
from kilobatch.launch.planning.machines import GIB
from kilobatch.launch.planning.plan import has_images, images_per_epoch, machine_memory, make_plan
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.recipe import read_recipe


def plan(
    name: str,
    overrides: list[str],
    *,
    nodes: int,
    gpus_per_node: int,
    gpu: str,
    images: int | None,
    classes: int,
    cores: int | None,
    memory_gib: float | None,
    measured: Path | None,
    as_json: bool,
) -> None:
    """Prints the plan of a recipe. Raises UserError for a recipe that is wrong, and for one that does not fit into
    memory: the message names the smallest change with which it does."""
    for option, value in (("nodes", nodes), ("gpus-per-node", gpus_per_node), ("classes", classes)):
        if value < 1:
            raise UserError(f"--{option} is {value}; it should be 1 or more")
    machine = machines.find_machine(gpu)
    if memory_gib is not None:
        machine = replace(machine, memory=int(memory_gib * GIB))
    rates = machines.read_measured(measured) if measured else None
    if rates and (rates.device == "cpu") != (machine.bandwidth is None):
        raise UserError(f"--measured {measured} is of {rates.device}, and --gpu is {gpu}; measure on such a machine")
    recipe, settings = read_recipe(name, overrides)
    try:
        check(recipe, nodes * gpus_per_node, settings, images=images)
    except UserError as error:
        if images is None and not has_images(recipe):
            raise UserError(f"{error}; to plan without the data, give --images, as 1281167 for ImageNet") from error
        raise
    if machine.memory is None:
        machine = replace(machine, memory=machine_memory() // gpus_per_node)
    images = images_per_epoch(recipe, images)
    run_plan = make_plan(recipe, machine, nodes, gpus_per_node, images, classes, cores, rates)
    if as_json:
        print(json.dumps(run_plan.as_json(), indent=2))
    else:
        from kilobatch.launch.planning import table

        table.print_plan(run_plan)
