"""Commands about recipes, methods and machines.

What a command needs is imported when it is called, so that `kilobatch --help` and a wrong option are answered at once.
"""

import json

import typer

from kilobatch.data.errors import UserError
from kilobatch.launch.cli.commands import machine_options
from kilobatch.launch.cli.commands.options import Force, Json, Overrides, Recipe


def recipes(
    name: machine_options.ShownRecipe = None,
    print_schema: machine_options.Schema = False,
    method: machine_options.SchemaMethod = None,
) -> None:
    """Lists the recipes and what each of them reproduces, or shows one of them whole."""
    if print_schema:
        from kilobatch.launch.recipes.recipe import schema

        print(json.dumps(schema([] if method is None else [method]), indent=2))
        return
    if method is not None:
        raise UserError("--method adds a method's options to the schema; ask for it with --schema")
    from kilobatch.launch.cli.reports.recipes import print_recipe, print_recipes

    print_recipes() if name is None else print_recipe(name)


def init(
    source: machine_options.OwnImages,
    method: machine_options.Pretraining = "simclr",
    out: machine_options.RecipeFile = None,
    gpu: machine_options.OwnGpu = None,
    gpus_per_node: machine_options.OwnGpusPerNode = None,
    workers_per_node: machine_options.WorkersPerNode = None,
    force: Force = False,
) -> None:
    """Writes a recipe for your own images. Each of its lines says why the option is as it is."""
    from kilobatch.launch.cli.init import init

    init(source, method, out, gpu, gpus_per_node, workers_per_node, force)


def options(section: machine_options.Section = None) -> None:
    """Lists what a recipe can set: every option with its type, bounds, default and meaning."""
    from kilobatch.launch.cli.reports.options import print_options

    print_options(section)


def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: machine_options.Gpu = "cpu",
    nodes: machine_options.Nodes = 1,
    gpus_per_node: machine_options.GpusPerNode = None,
    workers_per_node: machine_options.WorkersPerNode = None,
    images: machine_options.Images = None,
    classes: machine_options.Classes = 1000,
    cores: machine_options.Cores = None,
    gpu_memory: machine_options.GpuMemory = None,
    measured: machine_options.Measured = None,
    photo_side: machine_options.PhotoSide = None,
    as_json: Json = False,
) -> None:
    """Predicts memory, traffic and time of a run without its machines. Says so if the run cannot fit."""
    from kilobatch.launch.cli.reports.plan import plan

    plan(
        recipe,
        overrides or [],
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        workers_per_node=workers_per_node,
        gpu=gpu,
        images=images,
        classes=classes,
        cores=cores,
        memory_gib=gpu_memory,
        measured=measured,
        photo_side=photo_side,
        as_json=as_json,
    )


def bench(
    recipe: machine_options.BenchRecipe = None,
    overrides: Overrides = None,
    device: machine_options.BenchDevice = "auto",
    workers: machine_options.BenchWorkers = None,
    out: machine_options.BenchFile = None,
) -> None:
    """Measures loader, loss, training step and collectives on this machine, and compares each with its limit; or loader
    and step of a recipe."""
    from kilobatch.launch.cli.reports.bench import bench

    bench(device, workers, out, recipe, overrides or [])


def verify(method: machine_options.MethodName = None, everything: machine_options.AllMethods = False) -> None:
    """Compares a method's gradients with its paper's formula, for several numbers of ranks and chunks."""
    from kilobatch.launch.cli.reports import layouts, tables

    if method is not None and not everything and layouts.is_layout_subject(method):
        agrees = layouts.verify_layouts(method)
    else:
        agrees = tables.verify(method, everything)
    raise typer.Exit(0 if agrees else 1)


def new(kind: machine_options.NewKind, name: machine_options.NewName, force: Force = False) -> None:
    """Writes a commented start of a method of your own: a file that trains and passes verify as it is."""
    from kilobatch.launch.cli.reports.new_method import write_method

    assert kind == "method", kind
    write_method(name, force)
