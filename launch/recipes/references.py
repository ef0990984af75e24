"""Finds the runs and files that a recipe's method starts or learns from, and checks that they fit. Loads no torch.

A reference is a run (its folder, or its name under runs/), one of its checkpoints, or an exported .safetensors file.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kilobatch.data.errors import UserError, warn
from kilobatch.data.files import parse_model
from kilobatch.data.sources.specs import class_names, differing_classes
from kilobatch.launch.recipes import method_options
from kilobatch.launch.recipes.recipe import Recipe, load_recipe, recipe_from
from kilobatch.launch.runs import run_folder
from kilobatch.launch.runs.identity import ReferenceIdentity, read_references
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.options import is_reference
from kilobatch.trainer.checkpoint.description import DESCRIPTION, is_checkpoint, list_checkpoints, read_description
from kilobatch.trainer.checkpoint.exported_file import check_seal

ENCODER_START = "encoder.start"


def references(recipe: Recipe) -> dict[str, str]:
    """The references of a recipe, by the option: method.start and encoder.start, starting weights, and
    method.teacher."""
    kinds = {name: kind for name, (kind, _) in method_options.declared(recipe.method.name).arguments.items()}
    names = [name for name, kind in kinds.items() if is_reference(kind)]
    found: dict[str, Any] = {}
    for name in names:
        value = getattr(recipe.method, name)
        found |= (
            {f"method.{name}.{i}": one for i, one in enumerate(value)}
            if isinstance(value, tuple)
            else {f"method.{name}": value}
        )
    found[ENCODER_START] = recipe.encoder.start
    return {option: where for option, where in found.items() if where is not None}


def is_teacher(option: str) -> bool:
    """Whether the option of a reference names a teacher; the others are starting weights."""
    return option.startswith(("method.teacher", "method.further_teachers"))


def with_references(recipe: Recipe, changed: Mapping[str, str]) -> Recipe:
    """The recipe with other references, by the option."""
    for option, where in changed.items():
        section, name, *place = option.split(".")
        options: Any = getattr(recipe, section)
        value: Any = where
        if place:  # of several teachers
            value = tuple(where if i == int(place[0]) else one for i, one in enumerate(getattr(options, name)))
        recipe = recipe.model_copy(update={section: options.model_copy(update={name: value})})
    return recipe


def locate_reference(where: str) -> Path:
    """The path of a reference: a run's folder, a checkpoint's, or a file. Raises UserError where it is none of them."""
    path = Path(where).expanduser()
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file; kilobatch export makes one, or name a run's folder")
    return path if path.is_file() or is_checkpoint(path) else run_folder.find_run(where)


def locate_weights(where: str) -> Path:
    """The path of starting weights or a teacher: as of a reference, but a file may be of any package."""
    path = Path(where).expanduser()
    return path if path.is_file() else locate_reference(where)


def is_foreign(path: Path) -> bool:
    """Whether a path is a file that another package has written: it does not say a recipe of ours."""
    return path.is_file() and (path.suffix != ".safetensors" or "recipe" not in metadata_of(path))


def absolute_reference(where: str) -> str:
    """A reference as an absolute path, so that it can be used from any folder."""
    paths = Path(where).expanduser(), run_folder.FOLDER / where
    found = (path for path in paths if path.is_file() or is_checkpoint(path) or (path / "recipe.yaml").is_file())
    return str(next(found, paths[0]).absolute())


def recipe_of(where: str) -> Recipe:
    """The recipe that a run, a checkpoint or an exported file was trained with. Raises UserError."""
    path = locate_reference(where)
    if path.is_file():
        return recipe_in(metadata_of(path), path)
    meta = description_of(path) if is_checkpoint(path) else newest_description(path)
    if "recipe" not in meta and not is_checkpoint(path):  # it has none yet, or an earlier version wrote it
        return load_recipe(path / "recipe.yaml")[0]
    if "recipe" not in meta:
        raise UserError(f"checkpoint {path} says nothing of its recipe; name one that `kilobatch train` has made")
    return recipe_from(meta["recipe"], str(path))


def description_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of the run that wrote it. Raises UserError where it is damaged."""
    try:
        return read_description(checkpoint)["meta"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"checkpoint {checkpoint}: {DESCRIPTION} cannot be used: {error}; name another") from None


def newest_description(run: Path) -> dict[str, Any]:
    """What the newest checkpoint says that is not damaged; empty where there is none."""
    for checkpoint in reversed(list_checkpoints(run / "checkpoints").values()):
        try:
            return description_of(checkpoint)
        except UserError:  # training passes over it, too, with a warning
            continue
    return {}


def metadata_of(file: Path) -> dict[str, str]:
    """The metadata of an exported file. Raises UserError where it is not whole, or its metadata not as written."""
    try:
        with safe_open(file, framework="numpy") as opened:
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole .safetensors file ({error}); export or copy it again") from None
    forms = {"recipe": dict[str, Any], "class_names": list[str], **dict.fromkeys(("step", "images", "classes"), int)}
    for name in forms.keys() & metadata.keys():
        parse_model(metadata[name], file, forms[name], f"its {name} is not as it was written: export or copy it again")
    return metadata


def recipe_in(metadata: Mapping[str, str], file: Path) -> Recipe:
    """The recipe in an exported file's metadata. Raises UserError where it holds none."""
    if "recipe" not in metadata:
        raise UserError(f"{file} says nothing of its recipe; name a file that `kilobatch export` or import has written")
    return recipe_from(json.loads(metadata["recipe"]), str(file))


def begun(run: Path) -> bool:
    """Whether a run's training has begun: its references then stand for the weights that it began with."""
    return bool(list_checkpoints(run / "checkpoints") or read_references(run))


def check_references(
    recipe: Recipe, awaited: Mapping[str, Recipe], refuse: Callable[[str, str], UserError], classes: int | None = None
) -> None:
    """Raises UserError, worded by refuse(option, message), for a reference that leads nowhere or does not fit.

    awaited: the recipes of the runs that will have been trained by then, by reference; their folders are not read.
    classes: of data.train; None: not known here.
    """
    for option, where in references(recipe).items():
        teaches = is_teacher(option)
        if option == ENCODER_START:  # starting_weights.py checks it
            continue
        try:
            if teaches and where not in awaited and is_foreign(locate_weights(where)):
                continue  # what it holds is seen when it is loaded
            other = awaited[where] if where in awaited else recipe_of(where)
            if where not in awaited:
                refuse_damaged_or_unfinished(where, other)
        except UserError as error:
            raise refuse(option, f"{option} '{where}': {error}") from error
        encoder_only = where not in awaited and _holds_encoder_only(where)
        if teaches and method_options.declared(recipe.method.name).classifies:
            if encoder_only or not method_options.declared(other.method.name).classifies:
                made = "holds an encoder alone" if encoder_only else f"was trained by {other.method.name}"
                use = "kilobatch export --whole writes all" if encoder_only else "fine-tune it first, and name that run"
                raise refuse(option, f"{option} '{where}' {made}, which has no classifier to learn from; {use}")
            if where not in awaited and classes:
                _check_classes(recipe, option, where, classes, refuse)
        mine, theirs = recipe.data.groups[0], other.data.groups[0]  # all groups of a recipe are normalised alike
        if (mine.mean, mine.std) != (theirs.mean, theirs.std):
            raise refuse(
                option,
                f"{option} '{where}' was trained on images with data.views.mean {_numbers(theirs.mean)} and std "
                f"{_numbers(theirs.std)}, here they are {_numbers(mine.mean)} and {_numbers(mine.std)}; "
                "set them as there",
            )
        if not teaches and (differing := differing_encoder(recipe.encoder, other.encoder)):
            raise refuse(
                option,
                f"{option} '{where}' has another encoder: {differing}; set these as there, or start from another run",
            )
        if not teaches and hasattr(recipe.method, "layer"):
            start_head = (0, None) if encoder_only else method_options.head_of(other.method)
            method_options.check_head(recipe.method, where, start_head, refuse)


def _holds_encoder_only(where: str) -> bool:
    path = locate_reference(where)
    return path.is_file() and metadata_of(path).get("content") == "encoder"


def _check_classes(
    recipe: Recipe, option: str, where: str, classes: int, refuse: Callable[[str, str], UserError]
) -> None:
    """Raises UserError for a teacher of other classes than data.train has, or of the same in another order."""
    described = _described(where)
    taught, spec = int(described.get("classes", 0)), recipe.data.train
    if taught not in (0, classes):
        raise refuse(
            option,
            f"{option} '{where}' knows {taught} classes, and data.train '{spec}' has {classes}; "
            "let one teach that was fine-tuned on the same classes",
        )
    if learned := names_of_classes(described):  # else the worker warns
        try:
            _refuse_other_classes(recipe, where, learned, class_names(spec, "train"))
        except UserError as error:
            raise refuse(option, str(error)) from error


def refuse_other_teacher(recipe: Recipe, classes: list[str], where: str, found: ReferenceIdentity) -> None:
    """Raises UserError where a reference is the recipe's teacher, and its classes are others than `classes`, those of
    data.train. A warning where it does not say its classes."""
    taught_by = {where for option, where in references(recipe).items() if is_teacher(option)}
    if where not in taught_by or not method_options.declared(recipe.method.name).classifies:
        return
    if found.classes is None:
        warn(f"method.teacher '{where}' does not say the names of its classes, so that only their number was compared")
    else:
        _refuse_other_classes(recipe, where, found.classes, classes)


def _refuse_other_classes(recipe: Recipe, where: str, learned: list[str], classes: list[str]) -> None:
    """The student would learn the teacher's answers for other classes."""
    if getattr(recipe.method, "classes_by", "name") == "place":
        return
    if differing := differing_classes(learned, classes):
        raise UserError(
            f"method.teacher '{where}' has other classes than data.train '{recipe.data.train}', or the same in another "
            f"order: {differing[0]} there is {differing[1]} here; let one teach that was fine-tuned on the same "
            "classes, or, where classes of the same place mean the same, use method.classes_by=place"
        )


def names_of_classes(described: Mapping[str, Any]) -> list[str] | None:
    """The names in a checkpoint's description or a file's metadata, in order; None: it does not say them."""
    names = described.get("class_names")
    return json.loads(names) if isinstance(names, str) else names


def _described(where: str) -> Mapping[str, Any]:
    """What a run's newest checkpoint, a checkpoint or a file says of itself."""
    path = locate_reference(where)
    if path.is_file():
        return metadata_of(path)
    return description_of(path) if is_checkpoint(path) else newest_description(path)


def _numbers(values: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def refuse_damaged_or_unfinished(where: str, recipe: Recipe) -> None:
    """Raises UserError for a file that is damaged, and for a run whose steps are not all done and saved; a checkpoint,
    which is verified when it is loaded, or a file is meant as it is."""
    path = locate_reference(where)
    if path.is_file():
        check_seal(path)
    if path.is_file() or is_checkpoint(path):
        return
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise UserError(f"it has no checkpoint yet; train it first: kilobatch resume {path}")
    described = newest_description(path)
    if not {"step", "steps_per_epoch"} <= described.keys():  # of an earlier version, or all damaged
        return
    step, steps = described["step"], recipe.schedule.epochs * described["steps_per_epoch"]
    if step < steps:
        damaged = ", ".join(other.name for number, other in checkpoints.items() if number > step)
        whole = f", without {damaged}, whose description is damaged," if damaged else ""
        raise UserError(
            f"it has not finished: its newest checkpoint{whole} is of step {step} of {steps}; finish it first "
            f"(kilobatch resume {path}), or, where this checkpoint is meant, name it: {checkpoints.get(step, path)}"
        )


def differing_encoder(mine: EncoderOptions, theirs: EncoderOptions) -> str:
    """The options that decide on shapes and differ, in words; empty where none does."""
    ours, other = _shape_options(mine), _shape_options(theirs)
    found = [f"encoder.{name} {other[name]} there, {ours[name]} here" for name in ours if ours[name] != other[name]]
    return ", ".join(found)


def _shape_options(options: EncoderOptions) -> dict[str, object]:
    shaping = {name: value for name, value in (options.options or {}).items() if "drop" not in name}
    stem = options.stem if options.name.startswith("resnet") else None
    if options.sk_ratio and stem == "imagenet_same":
        stem = "imagenet"  # with selective kernels the two are the same network
    return {
        "name": options.name,
        "stem": stem,
        "width": options.times,
        "sk_ratio": options.sk_ratio,
        "options": shaping,  # without those that decide on no shape
    }
