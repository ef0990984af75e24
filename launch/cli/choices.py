"""Chooses the options of a recipe for one's own images, each with its reason, for `kilobatch init`."""

from dataclasses import dataclass
from functools import cache
from typing import Any

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.launch.cli.survey import Survey
from kilobatch.launch.recipes import catalogue, method_options
from kilobatch.launch.recipes.recipe import Recipe, recipe_from
from kilobatch.launch.recipes.settings import Settings
from kilobatch.methods.networks.options import BOTTLENECKS
from kilobatch.methods.options import is_reference

SMALL_SIDE = 64  # pixels; up to this, recipes for CIFAR-10 are nearer than those for ImageNet
FEW_IMAGES = 100_000  # below this, a ResNet-50 is more than they teach
# Steps of a training, and its fewest epochs. SimCLR's 100 epochs of ImageNet are 31,200 steps; the demo's are 360.
STEPS = {"cpu": 1_000, "gpu": 20_000}
FEWEST_EPOCHS = {"cpu": 10, "gpu": 100}
MOST_EPOCHS = 1_000  # the longest published trainings
CPU_BATCH = {"convnet": 256, "resnet18": 128}  # a step of more takes minutes
PAPERS_K = 200


@dataclass(frozen=True)
class Choice:
    """The value of an option, and the reason in one line; "" for none."""

    value: Any
    reason: str = ""


@dataclass(frozen=True)
class Place:
    """The machine that a recipe is for. workers: of the machine, one for each GPU; name: for messages."""

    name: str
    workers: int
    cpu: bool


Choices = dict[str, Choice]  # by dotted key


@cache
def contrasting_methods() -> dict[str, list[str]]:
    """The methods that train without labels and without another run, and the shipped recipes of each."""
    names = [name for name in method_options.method_names() if not (_learns_from_labels(name) or _needs_run(name))]
    found: dict[str, list[str]] = {name: [] for name in names}
    for recipe in catalogue.recipe_names():
        method = catalogue.read_settings(recipe).values["method"]["name"]
        if method in found:
            found[method].append(recipe)
    return found


def _learns_from_labels(method: str) -> bool:
    return method_options.declared(method).classifies


def _needs_run(method: str) -> bool:
    """Whether it has to be told of a run or a file to take from, such as a teacher."""
    return any(
        default is ... and is_reference(kind) for kind, default in method_options.declared(method).arguments.values()
    )


def recipe_to_extend(method: str, side: int) -> str:
    """The shipped recipe of a method that is nearest to images of this size: the newest of those for CIFAR-10 or for
    ImageNet. Raises UserError for an unknown method and for one that needs labels."""
    known = contrasting_methods()
    if method not in known:
        if method in method_options.method_names():
            what = "learns from labels, and starts from a run" if _learns_from_labels(method) else "needs a teacher"
            way_out = "kilobatch pipeline" if _learns_from_labels(method) else f"extend a recipe of {method} by hand"
            raise UserError(f"--method {method} {what}; pre-train with one of {', '.join(known)}, then {way_out}")
        raise UserError(f"--method is '{method}'{did_you_mean(method, known)}")
    if not known[method]:
        raise UserError(f"--method {method} has no recipe in configs/ to extend; write one there first")
    endings = ("_cifar10", "_imagenet") if side <= SMALL_SIDE else ("_imagenet", "_cifar10")
    for ending in endings:
        if fitting := [name for name in known[method] if name.endswith(ending)]:
            shortest = min(map(len, fitting))
            return max(name for name in fitting if len(name) == shortest)  # moco_v2_imagenet, not moco_v1_imagenet
    return known[method][0]


def choose(seen: Survey, place: Place, base_name: str, base: Recipe, batch: int | None, chunks: int) -> Choices:
    """All options that are not as in the recipe `base`. batch: None: to be chosen; chunks: of a worker's batch."""
    size, why_size = _view_size(seen, place)
    encoder = _encoder(seen, place, size)
    if batch is None:
        batch, why_batch = _batch(seen, place, base, base_name, encoder["encoder.name"].value)
    else:
        why_batch = f"as large as fits into the memory of {place.name}, by kilobatch plan"
    test = Choice(seen.test, f"{seen.test_images:,} images") if seen.test else Choice(None, seen.no_test)
    chosen: Choices = {
        "extends": Choice(base_name, "gives every option that is not set here"),
        "data.train": Choice(seen.train, f"{seen.images:,} images"),
        "data.test": test,
        "data.batch": Choice(batch, why_batch),
        **_views(base, size, why_size),
        **encoder,
        **_kernels(base, encoder["encoder.name"].value),
        **_method(seen, place, base, batch),
        **_rate(base, base_name, batch),
        **_schedule(seen, place, base, batch),
    }
    if chunks > 1:
        chosen["engine.chunks"] = Choice(chunks, f"parts of a worker's batch, so that it fits into {place.name}")
    if place.cpu and base.engine.precision not in ("auto", "fp32"):
        chosen["engine.precision"] = Choice("auto", "bf16 where the CPU has units for it, else fp32")
    elif place.name.startswith("v100") and base.engine.precision == "bf16":
        chosen["engine.precision"] = Choice("fp16", "a V100 has no bfloat16")
    if seen.test:
        chosen |= _evaluation(seen, chosen["schedule.epochs"].value)
    return chosen


def as_recipe(chosen: Choices) -> tuple[Recipe, Settings]:
    """The recipe with these options."""
    values: dict[str, Any] = {}
    for key, choice in chosen.items():
        *sections, last = key.split(".")
        into = values
        for section in sections:
            into = into.setdefault(section, {})
        into[last] = choice.value
    settings = catalogue.read_settings(values.pop("extends")).under(Settings(values, {(): "kilobatch init"}))
    return recipe_from(settings.values, "kilobatch init"), settings


def _view_size(seen: Survey, place: Place) -> tuple[int, str]:
    sizes = (32, 48, 64) if seen.side <= SMALL_SIDE else (64, 96, 128, 160, 192, 224)
    size = max((s for s in sizes if s <= seen.side), default=sizes[0])
    pixels = f"pixels; the images have about {seen.side} on their shorter side"
    if place.cpu and size > 96:
        return 96, f"{pixels}, and a CPU takes {(size / 96) ** 2:.0f} times as long for {size}"
    return size, pixels if size < 224 else f"{pixels}; 224 is the papers'"


def _views(base: Recipe, size: int, why: str) -> Choices:
    """The size of the first group's views, and in proportion those of all others."""
    first, *others = base.data.groups
    if not others:
        return {"data.views.size": Choice(size, why)}
    sides = [max(16, 8 * round(group.size * size / first.size / 8)) for group in others]
    groups = [group.model_copy(update={"size": side}) for group, side in zip(others, sides, strict=True)]
    dumped = [
        group.model_dump(mode="json", exclude_defaults=True)
        for group in (first.model_copy(update={"size": size}), *groups)
    ]
    return {"data.views": Choice(dumped, f"{why}; the further views in proportion")}


def _encoder(seen: Survey, place: Place, size: int) -> Choices:
    if size <= 32 and (place.cpu or seen.images < 10_000):
        return {"encoder.name": Choice("convnet", "four convolutions, which are enough for images this small")}
    name, why = "resnet18", f"{seen.images:,} images teach a ResNet-50 little more than this one"
    if place.cpu:
        why = "a ResNet-50 takes a CPU three times as long"
    elif seen.images >= FEW_IMAGES and size > SMALL_SIDE:
        name, why = "resnet50", "as in the papers; resnet18 takes a third of the time"
    stem = Choice("imagenet", "7x7 and max-pool, as in the papers")
    if size <= (48 if place.cpu else SMALL_SIDE):
        stem = Choice("cifar", "3x3 without max-pool, for images this small")
    return {"encoder.name": Choice(name, why), "encoder.stem": stem}


def _kernels(base: Recipe, name: str) -> Choices:
    if base.encoder.sk_ratio and name not in BOTTLENECKS:
        return {"encoder.sk_ratio": Choice(0.0, "selective kernels need a ResNet-50")}
    return {}


def _batch(seen: Survey, place: Place, base: Recipe, base_name: str, encoder: str) -> tuple[int, str]:
    """A power of two, or a multiple of the number of workers."""
    limits = {f"that of {base_name}": base.data.batch, "half of the images": max(2, seen.images // 2)}
    if place.cpu:
        limits["a step of more is long on a CPU"] = CPU_BATCH[encoder]
    why, most = min(limits.items(), key=lambda item: item[1])
    batch = 2 ** (most.bit_length() - 1)
    if place.workers > 1:
        batch = max(2 if place.workers == 2 else place.workers, batch // place.workers * place.workers)
    return batch, f"over all workers; {why}"


def _method(seen: Survey, place: Place, base: Recipe, batch: int) -> Choices:
    """The options of a method that count images, and those that need several workers."""
    chosen: Choices = {
        "method.name": Choice(base.method.name, f"kilobatch options {base.method.name} lists what can be set")
    }
    queue = getattr(base.method, "queue", None)
    if queue is not None:
        half = max(batch, seen.images // 2 // batch * batch)
        length = min(queue.length, half)
        if length < queue.length:
            chosen["method.queue.length"] = Choice(length, "keys of half of the images, in whole batches")
        for name, parts in (("hard", 8), ("mixed", 8), ("with_query", 64)):  # the shares that MoCHi's recipes have
            count = getattr(base.method, name, 0)
            if count > max(2, length // parts):
                chosen[f"method.{name}"] = Choice(max(2, length // parts), "in proportion to the queue")
    if getattr(base.method, "form", "") == "nce" and getattr(base.method, "noise", 0) >= seen.images:
        chosen["method.form"] = Choice("softmax", f"over all {seen.images:,} images, fewer than would be sampled")
    if getattr(base.method, "shuffle", False) and place.workers == 1:
        chosen["method.shuffle"] = Choice(False, "it needs several workers")
        chosen["encoder.norm"] = Choice("global", "statistics of the whole batch, as there is no shuffling")
    return chosen


def _rate(base: Recipe, base_name: str, batch: int) -> Choices:
    optimizer, own = base.optimizer, base.data.batch
    rate, why = optimizer.lr, f"that of {base_name}"
    if optimizer.scaling != "none":
        why += ", times batch / 256" if optimizer.scaling == "linear" else ", times the root of the batch"
    elif batch != own:
        root = optimizer.name in ("lars", "lamb")
        rate = float(f"{rate * (batch / own) ** (0.5 if root else 1):.3g}")
        why = f"{optimizer.lr:g} at batch {own:,} in {base_name}, in proportion to "
        why += "the root of the batch, as SimCLR's" if root else "the batch"
    return {"optimizer.name": Choice(optimizer.name, f"that of {base_name}"), "optimizer.lr": Choice(rate, why)}


def _schedule(seen: Survey, place: Place, base: Recipe, batch: int) -> Choices:
    kind, steps = "cpu" if place.cpu else "gpu", seen.images // batch
    wanted = round(STEPS[kind] / steps)
    epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS[kind], wanted))
    why = f"{epochs * steps:,} steps, {steps:,} an epoch; "
    if epochs > wanted:
        why += "fewer epochs show each image too seldom"
    elif epochs < wanted:
        why += "few images teach little in more"
    else:
        why += "a CPU takes long for more" if place.cpu else "about those of published trainings; more teach more"
    chosen = {"schedule.epochs": Choice(epochs, why)}
    warmup, share = base.schedule.warmup_epochs, epochs / base.schedule.epochs
    if warmup > epochs / 10:
        chosen["schedule.warmup_epochs"] = Choice(max(1, epochs // 10), "a tenth of the epochs")
    if base.schedule.milestones:
        falls = sorted({max(1, round(milestone * share)) for milestone in base.schedule.milestones})
        chosen["schedule.milestones"] = Choice([fall for fall in falls if fall < epochs], "at the same shares of them")
    return chosen


def _evaluation(seen: Survey, epochs: int) -> Choices:
    k = min(PAPERS_K, max(5, seen.images // 50))
    return {
        "evaluate.every_epochs": Choice(max(1, epochs // 10), "k-NN ten times in the training"),
        "evaluate.knn.k": Choice(
            k, f"neighbours that vote; {PAPERS_K} in the papers, here {k} for {seen.images:,} images"
        ),
        "evaluate.final": Choice(["knn", "fast_linear"], "at the end, both within minutes"),
    }
