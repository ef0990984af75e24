"""Estimates how long a whole training takes: at best, as its GPUs' vendor measures, and cautiously. Loads no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kilobatch.data.errors import UserError
from kilobatch.data.sources.specs import count_images
from kilobatch.data.views.groups import pixels_of_views
from kilobatch.data.views.options import Views
from kilobatch.launch.planning.machines import Machine, Measured
from kilobatch.launch.planning.photos import Photos
from kilobatch.launch.planning.step_time import Time, rate_of
from kilobatch.launch.recipes.recipe import Recipe

if TYPE_CHECKING:
    from kilobatch.launch.planning.fake_step import Step, StepLayout

# Times the vendor's rate on an A100 that is reached at best: by NVIDIA's figures a V100 does 31.2 operations for each
# byte of its memory's bandwidth, and an A100 29.4 (machines.py).
BEST = 1.06
# Share of that rate which a published training of this kind reached. MoCo's authors trained a ResNet-50 for 200 epochs
# of 1,281,167 images in 53 hours on eight V100s in fp32 (README of github.com/facebookresearch/moco): 168 images a
# second on each, of 32.4 GFLOP (24.3 for the queries, a third of that for the keys), or 5.44 TFLOP a second, where a
# plan has 10.1. Their loading, communication and framework are in it.
PRACTICE = 0.54
# Share of a measured rate that another network, or the whole loop, may reach on the same machine; an assumption.
OTHER_NETWORK = 0.7
# Times that colour operations and blurs read or write each number of a view on a GPU, where no kernel joins them; by
# counting torch's operations in data/augment/torch_ops.py, and so more than what the kernels do.
COLOUR_PASSES = 40
# Seconds in which Python and torch start the operations of one parameter tensor on a GPU, forward, backward and update:
# about a dozen at 8 µs for each chunk; an assumption. A small network's step takes no less.
STARTING = 1e-4
TESTED = 0.04  # test images for each training image where they are not known: 50,000 for 1,281,167 in ImageNet


@dataclass(frozen=True)
class Span:
    """Seconds, or something else that is estimated. least: at best; most: cautiously."""

    least: float
    most: float

    def __add__(self, other: "Span") -> "Span":
        return Span(self.least + other.least, self.most + other.most)

    def times(self, factor: float) -> "Span":
        return Span(self.least * factor, self.most * factor)


@dataclass(frozen=True)
class Duration:
    """Seconds of a whole run. step: of a step; evaluations: those while training and at its end; images: trained a
    second, by all ranks; rests_on: what these rest on, in sentences."""

    step: Span
    training: Span
    evaluations: Span
    images: Span
    rests_on: tuple[str, ...]

    @property
    def whole(self) -> Span:
        return self.training + self.evaluations


@dataclass(frozen=True)
class Setting:
    """What a duration is asked for. images: of an epoch; cores: of a node, None: not known."""

    recipe: Recipe
    machine: Machine
    nodes: int
    images: int
    steps: int
    cores: int | None
    photos: Photos
    measured: Measured | None

    @property
    def on_gpu(self) -> bool:
        return self.machine.bandwidth is not None

    @property
    def best(self) -> float:
        """Times the estimated rate, what is reached at best."""
        return 1.0 if self.measured else BEST

    @property
    def share(self) -> float:
        """Of the estimated rate, what is reached cautiously."""
        return OTHER_NETWORK if self.measured else PRACTICE


def estimate_duration(setting: Setting, step: "Step", layout: "StepLayout", time: Time) -> Duration | None:
    """The time of a whole run; None where no rate is known."""
    if time.compute is None or time.communication is None or time.step is None:
        return None
    recipe = setting.recipe
    colours = _colour_seconds(layout.samples, recipe.data.groups, setting.machine)
    starting = STARTING * step.tensors * layout.chunks if setting.on_gpu else 0.0
    slow = max(time.compute / setting.share + colours, starting) + time.communication
    loader = time.loader or 0.0
    # A CPU's cores also decode: what runs beside the step there takes its time from it.
    best = max(time.compute / setting.best + time.communication, loader)
    of_step = Span(best, max(slow, loader) if setting.on_gpu else slow + loader)
    tests = _test_images(recipe, setting.images)
    evaluations = _evaluations(setting, step, layout, tests)
    images = Span(recipe.data.batch / of_step.most, recipe.data.batch / of_step.least)
    rests_on = tuple(_rests_on(setting, colours, starting, of_step, time))
    return Duration(of_step, of_step.times(setting.steps), evaluations, images, rests_on)


def _colour_seconds(samples: int, groups: Sequence[Views], machine: Machine) -> float:
    """Seconds of a step that a GPU changes colours; 0 where the loader's cores do."""
    coloured = [group for group in groups if group.jitter or group.blur]
    if machine.bandwidth is None or not coloured:
        return 0.0
    return COLOUR_PASSES * 4 * 3 * pixels_of_views(coloured) * samples / machine.bandwidth


def _test_images(recipe: Recipe, images: int) -> int:
    if recipe.data.test is None:
        return 0
    try:
        return count_images(recipe.data.test, "test")
    except UserError:  # it is not on this machine, as data.train may not be
        return round(TESTED * images)


def _evaluations(setting: Setting, step: "Step", layout: "StepLayout", tests: int) -> Span:
    """Seconds of all evaluations: the encoder's forward of one view of each image that they look at, or its loading."""
    recipe = setting.recipe
    rate = rate_of(recipe, setting.machine, setting.measured, layout.ranks // setting.nodes)
    if recipe.data.test is None or rate is None:
        return Span(0.0, 0.0)
    looked_at = sum(_looked_at(name, recipe, setting.images, tests) for name in recipe.evaluate.final)
    if every := recipe.evaluate.every_epochs:
        looked_at += recipe.schedule.epochs // every * _looked_at(recipe.evaluate.during, recipe, setting.images, tests)
    one = recipe.data.groups[0].model_copy(update={"count": 1})
    views = pixels_of_views(recipe.data.groups) / pixels_of_views(one)  # of an image, as many as of the first's size
    forward = step.forward / (layout.samples // layout.chunks * views)
    compute = looked_at * forward / (rate * layout.ranks)
    load = setting.photos.seconds(one, True, setting.measured) if not setting.measured else 0.0
    loader = looked_at * load / (setting.cores * setting.nodes) if setting.cores else 0.0
    if setting.on_gpu:
        return Span(max(compute / setting.best, loader), max(compute / setting.share, loader))
    return Span(max(compute, loader), compute / setting.share + loader)


def _looked_at(evaluator: str, recipe: Recipe, images: int, tests: int) -> int:
    """Images whose features an evaluator computes, each as often as it does."""
    match evaluator:
        case "knn" | "fast_linear":
            return images + tests
        case "linear":
            return recipe.evaluate.linear.epochs * images + tests
        case "moved":  # with the trained and with the untrained encoder, clean and moved
            return 2 * (images + 2 * tests)
        case "classify" | "classify_moved":
            return tests
        case _:  # a picture shows few
            return 0


def _rests_on(setting: Setting, colours: float, starting: float, step: Span, time: Time) -> Iterator[str]:
    """colours, starting: seconds of a step that these take, cautiously."""
    if setting.measured:
        what = (
            "a training step of another network" if setting.measured.whole else "forward and backward of this encoder"
        )
        yield f"at best: {what}, measured on {setting.measured.described}"
        yield f"cautiously: {OTHER_NETWORK:.0%} of that rate, an assumption"
    else:
        fp32 = setting.recipe.engine.precision == "fp32"
        published = f"{'938 images per second in TF32' if fp32 else '2,470 images per second in 16 bits'} on an A100"
        yield (
            f"at best: {BEST - 1:.0%} more than ResNet-50's training as NVIDIA publishes it, {published}, by the "
            "bandwidth of this GPU's memory"
        )
        yield (
            f"cautiously: {PRACTICE:.0%} of NVIDIA's figure, as MoCo's authors reached (200 epochs in 53 hours on "
            "eight V100s); loading and the framework's own time are in it"
        )
    if setting.on_gpu and colours:
        yield f"cautiously: colour operations on the GPU, {max(0.01, colours / step.most):.0%} of a step"
    if setting.on_gpu:
        yield f"cautiously: at least {starting * 1e3:,.1f} milliseconds a step, in which Python starts its operations"
    cores = f"{setting.cores} cores of each node" if setting.cores else "as many cores as keep up (--cores counts them)"
    yield f"loader: {setting.photos.source}, decoded by {cores}"
    if time.communication:
        yield "communication between ranks, which nothing hides"
    evaluate, every = setting.recipe.evaluate, setting.recipe.evaluate.every_epochs
    if setting.recipe.data.test is not None:
        during = f"{evaluate.during} after every {f'{every} epochs' if every > 1 else 'epoch'}" if every else ""
        at_end = f"{', '.join(evaluate.final)} at the end" if evaluate.final else ""
        yield f"evaluations: {' and '.join(filter(None, (during, at_end))) or 'none'}"


def in_words(span: Span) -> str:
    """A time such as "about 9 to 14 hours", with the days beside it from two days on."""
    if span.most < 1:
        return "less than a second"
    for unit, seconds, up_to in (("seconds", 1, 120), ("minutes", 60, 7200), ("hours", 3600, float("inf"))):
        if span.most < up_to:
            days = f" ({in_range(span.times(1 / 86_400))} days)" if span.most >= 172_800 else ""
            return f"about {in_range(span.times(1 / seconds))} {unit}{days}"
    raise AssertionError("the last unit has no end")


def in_range(span: Span) -> str:
    """Two numbers such as "9.2 to 14", or one where they are the same when rounded."""
    least, most = (_rounded(number) for number in (span.least, span.most))
    return most if least == most else f"{least} to {most}"


def _rounded(number: float) -> str:
    """With two digits, or all before the point."""
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"
