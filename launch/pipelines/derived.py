"""Stages that a recipe of one's own lacks, derived from a shipped recipe's: its settings, with the images, views and
encoder of the recipe that is given. Loads no torch."""

import json
from math import ceil
from typing import Any

from kilobatch.data.loading.labels import count_labelled
from kilobatch.launch.pipelines.pipeline import StageName
from kilobatch.launch.recipes.recipe import Recipe, resolve_recipe
from kilobatch.methods.networks.options import BOTTLENECKS

METHOD = "simclr_v2"  # whose recipes have all stages
SMALL_SIDE = 64  # pixels; for larger views ImageNet's recipes are nearer than CIFAR-10's
FEWEST_STEPS = 200  # of a fine-tuning; the published one of 1 % of ImageNet has 751
GEOMETRY = ("size", "interpolation", "flip", "affine", "mean", "std")
COLOURS: dict[str, Any] = {"jitter": None, "photometric": None, "grey": 0.0, "blur": None, "solarize": None}
# 0.002 is the shipped one, for selective kernels; the paper has this one for networks without them.
RATE_WITHOUT_SK = 0.005


def derived(first: Recipe, stage: StageName, self_distill: bool, changes: list[str]) -> tuple[str, list[str]]:
    """The shipped recipe that a stage is derived from, and its overrides by the recipe of the first stage.

    changes: the overrides that come after these, which may say which images have labels. Raises UserError as
    resolve_recipe does, and where the labelled images cannot be counted.
    """
    family = f"simclr_v2_{_kind(first)}"
    base_name = f"{family}_finetune"
    if stage == "distill":
        base_name = f"{family}_selfdistill" if self_distill else f"{family}_distill"
    base = resolve_recipe(base_name, [])
    common = _common(first, base)
    if stage == "distill":
        return base_name, _texts(common | _distillation(first, self_distill))
    common["data.labels"] = first.data.labels.model_dump()
    asked = resolve_recipe(base_name, [*_texts(common), *changes])
    return base_name, _texts(common | _fine_tuning(first, base, asked))


def describe(recipe: Recipe, base_name: str, missing: str, given: str) -> str:
    """What a derived stage is, for the user."""
    return (
        f"{missing} is not there: as {base_name}, with the images, views and encoder of {given} "
        f"({recipe.encoder.name}, batch {recipe.data.batch}, {recipe.schedule.epochs} epochs)"
    )


def _kind(first: Recipe) -> str:
    if first.encoder.name == "convnet":
        return "digits"
    return "cifar10" if first.data.groups[0].size <= SMALL_SIDE else "imagenet"


def _common(first: Recipe, base: Recipe) -> dict[str, Any]:
    """Images, views without changes of colours (as in the paper), and the machine's options."""
    data, views = first.data, first.data.groups[0].model_dump(mode="json")
    values: dict[str, Any] = {"data.train": data.train, "data.test": data.test, "data.threads": data.threads}
    values |= {f"data.views.{name}": views[name] for name in GEOMETRY}
    values |= {f"data.views.{name}": value for name, value in COLOURS.items()}
    if data.groups[0].crop is None or base.data.groups[0].crop is None:
        values["data.views.crop"] = views["crop"]
    values |= {"engine.precision": first.engine.precision, "run.seed": first.run.seed, "run.device": first.run.device}
    return values | {"evaluate.during": "classify", "evaluate.final": ["classify"]}


def _fine_tuning(first: Recipe, base: Recipe, asked: Recipe) -> dict[str, Any]:
    """asked: with the labels that are asked for."""
    labels, batch = asked.data.labels, first.data.batch
    labelled = count_labelled(first.data.train, labels, asked.data.order)
    while batch > min(labelled, base.data.batch) and batch % 2 == 0:  # halves divide over the workers, mostly
        batch //= 2
    epochs = max(base.schedule.epochs, ceil(FEWEST_STEPS / max(1, labelled // batch)))
    layers = getattr(first.method, "layers", 1)
    values: dict[str, Any] = {"encoder": _encoder(first), "data.batch": batch, "schedule.epochs": epochs}
    values["method.layer"] = 0 if labels.all else min(1, layers - 1)  # as in the paper
    values["method.hidden"] = getattr(first.method, "hidden", None)
    if base.optimizer.name == "lars" and not first.encoder.sk_ratio:
        values["optimizer.lr"] = RATE_WITHOUT_SK
    return values | {"evaluate.every_epochs": max(1, epochs // 10)}


def _distillation(first: Recipe, self_distill: bool) -> dict[str, Any]:
    """Batch and optimizer as in pre-training, half of its epochs, as in the paper."""
    epochs = max(1, first.schedule.epochs // 2)
    values: dict[str, Any] = {"encoder": _encoder(first) | ({} if self_distill else _student(first))}
    values |= {"data.batch": first.data.batch, "optimizer": first.optimizer.model_dump(mode="json")}
    values |= {"schedule.epochs": epochs, "schedule.warmup_epochs": epochs / 20}
    return values | {"evaluate.every_epochs": max(1, epochs // 10)}


def _encoder(first: Recipe) -> dict[str, Any]:
    """The first one's network. Its starting weights are its own: later stages begin with what it has made of them."""
    return first.encoder.model_dump(exclude={"start", "start_share", "start_prefix"})


def _student(first: Recipe) -> dict[str, Any]:
    """A network that is smaller than the first one's, where there is one: half of the width, or a ResNet-18."""
    if first.encoder.name == "convnet":
        return {"width": max(1, first.encoder.times // 2)}
    smaller = {"name": "resnet18"} if first.encoder.name in BOTTLENECKS else {}
    return smaller | {"width": None, "sk_ratio": 0.0}


def _texts(values: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]
