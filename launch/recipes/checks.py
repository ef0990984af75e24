"""Checks whether a recipe's parts fit each other, the data and the number of workers: what no single option can know.
Loads no torch; devices are checked in worker/devices.py, on the machine that the workers run on."""

from collections.abc import Callable, Mapping

from kilobatch.data.errors import Mistakes, UserError
from kilobatch.data.loading.labels import count_labelled, count_used
from kilobatch.data.loading.options import order_problem
from kilobatch.data.sources.specs import Split, count_classes, count_images, field_names, has_labels_alone
from kilobatch.launch.recipes import method_options, references, validation_errors
from kilobatch.launch.recipes.evaluator_checks import check_evaluators
from kilobatch.launch.recipes.outside.starting_weights import check_encoder_start
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.settings import Settings
from kilobatch.methods.backbone_names import check_name
from kilobatch.methods.options import Constraint, OptionContext
from kilobatch.trainer.options import chunks_problem, zero_problem

Refuse = Callable[[str, str], UserError]  # from an option, such as data.batch, and a message; says where it was written


def check(
    recipe: Recipe,
    workers: int,
    settings: Settings,
    evaluators: list[str] | None = None,
    awaited: Mapping[str, Recipe] | None = None,
    begun: bool = False,
    images: int | None = None,
) -> None:
    """Raises UserError for all parts that do not fit, each on a line, before any process is started or image decoded.

    settings: where the recipe's values were written, for the message; evaluators: what will run; None: training, and
    the recipe's own; awaited: runs that the recipe's method starts or learns from and that will have been trained by
    then, as the method names them; begun: whether the training has begun, so that it no longer looks for such runs;
    images: of data.train, where the data are not to be looked for.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; it should be 1 or more")

    def refuse(dotted: str, message: str) -> UserError:
        key = tuple(int(name) if name.isdecimal() else name for name in dotted.split("."))
        return UserError(f"{settings.where(key)}: {message}")

    mistakes = Mistakes()
    chunks = 1 if recipe.engine.chunks == "auto" else recipe.engine.chunks
    training = evaluators is None
    with mistakes.noted():
        _check_encoder(recipe, refuse)
    if training:  # an evaluation has no steps: it uses neither the views nor the batch, nor what depends on them
        with mistakes.noted():
            _check_views(recipe, refuse)
        with mistakes.noted():
            _check_batch(recipe, workers, chunks, refuse)
        _check_engine(recipe, chunks, refuse, mistakes)
        context = OptionContext(recipe.method, recipe.encoder, workers, chunks, recipe.data.batch)
        _check_options(recipe, context, settings, mistakes)
    classes, enough = None, None
    with mistakes.noted():
        samples = images if images is not None else _count(recipe, "train", refuse)
        classes = _count_classes(recipe, refuse) if images is None else None
        if images is None and recipe.data.order is not None:
            samples = count_used(recipe.data.train, recipe.data.order)
        if training:
            used = _used(recipe, samples, refuse) if images is None else samples
            _check_size(recipe, workers * chunks, samples, used, refuse)
            _check_order(recipe, samples, images is None, refuse)
        enough = samples
    if images is None:
        with mistakes.noted():
            _check_fields(recipe, refuse)
    if training and not begun:
        with mistakes.noted():
            references.check_references(recipe, awaited or {}, refuse, classes)
        with mistakes.noted():
            check_encoder_start(recipe, awaited or {}, refuse)
    if recipe.data.test is not None and images is None:
        with mistakes.noted():
            _count(recipe, "test", refuse)
        check_evaluators(recipe, workers, enough, evaluators, refuse, mistakes)
    mistakes.refuse()


def _check_views(recipe: Recipe, refuse: Refuse) -> None:
    name, groups, declared = recipe.method.name, recipe.data.groups, method_options.declared(recipe.method.name)
    if len(groups) > 1 and not declared.further_groups:
        able = [other for other in method_options.method_names() if method_options.declared(other).further_groups]
        raise refuse(
            "data.views",
            f"data.views has {len(groups)} groups of views, but method {name} takes one (several: "
            f"{', '.join(able) or 'no method yet'}); give it as one mapping, or as a list of one",
        )
    views, wanted = next(iter(groups)), declared.views
    first = "data.views.0" if isinstance(recipe.data.views, tuple) else "data.views"
    if wanted not in (None, views.count):
        raise refuse(
            f"{first}.count",
            f"{first}.count is {views.count}, but method {name} takes {wanted} views of an image; use {wanted}",
        )
    if views.by_patch and not declared.jigsaw:
        able = [other for other in method_options.method_names() if method_options.declared(other).jigsaw]
        raise refuse(
            f"{first}.second.by_patch",
            f"{first}.second.by_patch is true, but method {name} makes no patches (these do: "
            f"{', '.join(able)}); use false",
        )


def _check_batch(recipe: Recipe, workers: int, chunks: int, refuse: Refuse) -> None:
    batch, parts = recipe.data.batch, workers * chunks
    if batch < 2 and not method_options.declared(recipe.method.name).classifies:
        raise refuse("data.batch", f"data.batch {batch} has no other image to contrast with; use 2 or more")
    if batch % parts:
        below, above = batch // parts * parts, -(-batch // parts) * parts
        use = f"{below} or {above}" if below else f"{above}"
        raise refuse(
            "data.batch",
            f"data.batch {batch} does not divide over {workers} workers × {chunks} chunks = {parts}; use {use}",
        )


def _check_engine(recipe: Recipe, chunks: int, refuse: Refuse, mistakes: Mistakes) -> None:
    if problem := chunks_problem(chunks, recipe.encoder.norm == "global"):
        mistakes.add(str(refuse("engine.chunks", problem)))
    if problem := zero_problem(recipe.engine.zero, recipe.optimizer.name):
        mistakes.add(str(refuse("engine.zero", problem)))
    if recipe.engine.compile and recipe.encoder.checkpoint:
        problem = (
            "encoder.checkpoint is true with engine.compile: a compiled network chooses itself what it computes again; "
            "use engine.compile=false, or encoder.checkpoint=false"
        )
        mistakes.add(str(refuse("encoder.checkpoint", problem)))
    if recipe.engine.adversarial and not method_options.declared(recipe.method.name).pairwise:
        able = [name for name in method_options.method_names() if method_options.declared(name).pairwise]
        problem = (
            f"engine.adversarial is set, but method {recipe.method.name} does not compare two views by a loss that any "
            f"two of them go into (these do: {', '.join(able)}); use engine.adversarial=null"
        )
        mistakes.add(str(refuse("engine.adversarial", problem)))


def _check_options(recipe: Recipe, context: OptionContext, settings: Settings, mistakes: Mistakes) -> None:
    """The constraints of the method's options: of groups of options first, then those that a type carries. Of each
    option the first that does not hold is noted."""
    constraints = [(name, type(value)) for name, value in recipe.method]
    fields = type(recipe.method).model_fields.items()
    constraints += [(name, constraint) for name, field in fields for constraint in field.metadata]
    refused: set[str] = set()
    for name, constraint in constraints:
        if name in refused or not isinstance(constraint, Constraint):
            continue
        try:
            constraint.check(getattr(recipe.method, name), context)
        except UserError as error:
            key, message = ("method", name), str(error)
            where = validation_errors.where_of_parts(key, message, settings) or settings.where(key)
            mistakes.add(f"{where}: {message}")
            refused.add(name)


def _check_encoder(recipe: Recipe, refuse: Refuse) -> None:
    if not recipe.encoder.foreign:
        return
    try:
        check_name(recipe.encoder.name)
    except UserError as error:
        raise refuse("encoder.name", str(error)) from error


def _count_classes(recipe: Recipe, refuse: Refuse) -> int | None:
    """Classes of data.train for a method that learns them, else None. Raises UserError for a single one."""
    name = recipe.method.name
    classes = count_classes(recipe.data.train, "train") if method_options.declared(name).classifies else None
    if classes == 0:
        raise refuse(
            "data.train",
            f"data.train '{recipe.data.train}' has no labels, and method {name} learns from labels alone; use images "
            "with labels (kilobatch convert --help names the sources), or another method",
        )
    if classes == 1:
        raise refuse(
            "data.train",
            f"data.train '{recipe.data.train}' has a single class, and method {name} nothing to tell "
            "apart; a folder: source needs a folder for each class",
        )
    return classes


def _used(recipe: Recipe, samples: int, refuse: Refuse) -> int:
    """Training images that are trained on: all, or those with labels."""
    labels = recipe.data.labels
    if labels.all and has_labels_alone(recipe.data.train):
        return samples
    try:
        labelled = count_labelled(recipe.data.train, labels, recipe.data.order)
    except UserError as error:
        raise refuse("data.labels.list" if labels.list else "data.labels", str(error)) from error
    if recipe.data.unlabelled == "drop":
        return labelled
    declared = method_options.declared(recipe.method.name)
    if declared.classifies and "teacher" not in declared.arguments and labelled < samples:
        raise refuse(
            "data.unlabelled",
            f"data.unlabelled is keep, but method {recipe.method.name} learns from labels alone, and "
            f"{samples - labelled} of {samples} images have none; use data.unlabelled=drop",
        )
    return samples


def _check_order(recipe: Recipe, samples: int, known: bool, refuse: Refuse) -> None:
    """samples: training images; known: whether the data may be looked for."""
    order, data = recipe.data.order, recipe.data
    if order is None or order.by_class is None:
        return
    keeping = known and data.unlabelled == "keep"
    unlabelled = samples - count_labelled(data.train, data.labels, order) if keeping else 0
    classes = count_classes(data.train, "train") if known else None
    if problem := order_problem(order, data.batch, classes, unlabelled):
        raise refuse(order.by_class.partition(" ")[0], problem)


def _check_fields(recipe: Recipe, refuse: Refuse) -> None:
    """Raises UserError for a field that the method needs and data.train lacks."""
    needs = method_options.declared(recipe.method.name).needs
    if not needs:
        return
    try:
        there = field_names(recipe.data.train, "train")
    except UserError:
        return  # the images are not there either, which has been noted
    if missing := sorted(needs - {*there}):
        raise refuse(
            "data.train",
            f"method {recipe.method.name} needs {', '.join(sorted(needs))} beside images and labels, and data.train "
            f"'{recipe.data.train}' has no {', '.join(missing)} (its fields: {', '.join(there) or 'none'}); use "
            f"npz:FILE with an array {missing[0]}, a row for each image, or a .beton of it",
        )


def _check_size(recipe: Recipe, parts: int, samples: int, used: int, refuse: Refuse) -> None:
    """samples, used: images of data.train, and those of them that are trained on."""
    batch = recipe.data.batch
    if used < batch:
        most = used // parts * parts
        way_out = f"use at most {most}" if most >= 2 else f"{max(2, parts)} is the least here: add images"
        which = "images" if used == samples else "labelled images (data.unlabelled is drop)"
        if recipe.data.order is not None and recipe.data.order.long_tailed is not None:
            which += " that data.order.long_tailed leaves"
        raise refuse(
            "data.batch",
            f"data.batch {batch} is more than the {used} {which} of data.train '{recipe.data.train}'; {way_out}",
        )


def _count(recipe: Recipe, split: Split, refuse: Refuse) -> int:
    """The number of images of data.train or data.test. Decodes none of them."""
    spec = recipe.data.train if split == "train" else recipe.data.test
    assert spec is not None
    try:
        return count_images(spec, split)
    except UserError as error:
        raise refuse(f"data.{split}", str(error)) from error
