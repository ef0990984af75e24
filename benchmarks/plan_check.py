"""Memory that `kilobatch plan` predicts, compared with the memory of real steps on this machine.

    python -m benchmarks.plan_check              # a few minutes
    python -m benchmarks.plan_check --ranks 2

Each case is a method, its optimizer and DeepSpeed's engine in processes of their own, three steps on the same random
views. Measured: the most memory that torch's CPU allocator had given out at one time, by the profiler's records, from
before the method is built. Predicted: all parts of the plan but the loader's. The largest of the ranks is shown.
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

from kilobatch.data.batch import blank, make_batch
from kilobatch.launch.planning.fake_step import StepLayout, run_fake_step
from kilobatch.launch.planning.machines import find_machine, on_machine
from kilobatch.launch.planning.memory import peak_memory
from kilobatch.launch.recipes.recipe import Recipe, resolve_recipe
from kilobatch.launch.worker.pretrained import build_of_recipe
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts
from kilobatch.trainer.bench.step import train_step
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim import optimizers
from kilobatch.trainer.ranks.spawn import run_ranks

IMAGES, CLASSES = 1000, 10
SMALL = ["data.views.size=32", "encoder.name=resnet18", "encoder.stem=cifar", "engine.precision=fp32"]
CASES: dict[str, tuple[str, list[str]]] = {
    "the demo, 64 images": ("demo", ["data.batch=64"]),
    "the demo, 256 images": ("demo", ["data.batch=256"]),
    "the demo in 4 chunks, 2 kept": (
        "demo",
        ["data.batch=256", "encoder.norm=local", "engine.chunks=4", "engine.keep=2"],
    ),
    "SimCLR, ResNet-18, 32 images": ("simclr_imagenet", ["data.batch=32", *SMALL]),
    "SimCLR, ResNet-18, 128 images": ("simclr_imagenet", ["data.batch=128", *SMALL]),
    "the same in bf16": ("simclr_imagenet", ["data.batch=128", *SMALL, "engine.precision=bf16"]),
    "the same, its first stages frozen, rates by depth": (
        "simclr_imagenet",
        [
            "data.batch=128",
            *SMALL,
            "optimizer.freeze=[encoder.conv1,encoder.bn1,encoder.layer1]",
            "optimizer.layer_decay=0.65",
        ],
    ),
    "the same at ZeRO 2": ("simclr_imagenet", ["data.batch=32", *SMALL, "engine.zero=2"]),
    "MoCo v2, ResNet-18, 64 images": (
        "moco_v2_imagenet",
        ["data.batch=64", *SMALL, "method.shuffle=false", "method.queue.length=16384"],
    ),
    "MoCo v3, ViT-S, 16 images": ("moco_v3_vit_small_imagenet", ["data.batch=16", "data.views.size=96", *SMALL[3:]]),
}


def predicted(recipe: Recipe, ranks: int) -> int:
    recipe = on_machine(recipe, find_machine("cpu"))
    layout = StepLayout(ranks, recipe.data.batch // ranks, int(recipe.engine.chunks))
    keep = recipe.engine.keep if isinstance(recipe.engine.keep, int) else layout.chunks
    peak = peak_memory(
        run_fake_step(recipe, layout, IMAGES, CLASSES),
        layout,
        keep,
        recipe.engine.zero,
        recipe.data.groups,
        find_machine("cpu"),
    )
    return peak.total - peak.parts["views"]


def measured(name: str, changes: list[str]) -> int:
    """Bytes that this rank takes."""
    recipe = on_machine(resolve_recipe(name, changes), find_machine("cpu"))
    n = recipe.data.batch // collectives.world_size()
    pixels = [torch.randn_like(group) for group in blank(n, recipe.data.groups).views]
    batch = make_batch(pixels, label=torch.arange(n) % CLASSES)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        method = build_of_recipe(recipe, DataFacts(IMAGES, CLASSES))
        engine = Engine(
            method,
            optimizers.build_optimizer(recipe.optimizer, method, recipe.data.batch),
            recipe.engine.options(),
            torch.device("cpu"),
            n,
        )
        for _ in range(3):
            train_step(engine, batch)
    events = records.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
        peak = max(peak, live)
    return peak


def both(name: str, changes: list[str], ranks: int) -> tuple[int, int]:
    """Predicted and measured bytes."""
    of_ranks = run_ranks(ranks, measured, name, changes, timeout=600)
    return predicted(resolve_recipe(name, changes), ranks), max(of_ranks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--cases", nargs="*", default=[*CASES])
    options = parser.parse_args()
    print("case | predicted, MiB | measured, MiB | predicted / measured")
    for case in options.cases:
        bytes_predicted, bytes_measured = both(*CASES[case], options.ranks)
        sizes = f"{bytes_predicted / 2**20:.1f} | {bytes_measured / 2**20:.1f}"
        print(f"{case} | {sizes} | {bytes_predicted / bytes_measured:.3f}", flush=True)


if __name__ == "__main__":
    main()
