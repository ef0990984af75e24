"""Finds the runs and files that a recipe's method starts or learns from, and checks that they fit. Loads no torch.

A reference is a run (its folder, or its name under runs/), one of its checkpoints, or an exported .safetensors file.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes import method_options
from kilobatch.launch.recipes.recipe import Recipe, load_recipe, recipe_from
from kilobatch.launch.runs import run_folder
from kilobatch.methods.networks.options import EncoderOptions, refuse_layers
from kilobatch.methods.options import Reference
from kilobatch.trainer.checkpoint.description import DESCRIPTION, is_checkpoint, list_checkpoints, unsealed

PINNED = "trained.json"  # in a run's folder: the files that its references stood for when it began


def references(recipe: Recipe) -> dict[str, str]:
    """The references of the recipe's method, by the option's name: `start`, starting weights, and `teacher`."""
    kinds = {name: kind for name, (kind, _) in method_options.declared(recipe.method.name).arguments.items()}
    names = [name for name, kind in kinds.items() if Reference in (kind, *get_args(kind))]
    return {name: where for name in names if (where := getattr(recipe.method, name)) is not None}


def locate_reference(where: str) -> Path:
    """The path of a reference: a run's folder, a checkpoint's, or a file. Raises UserError where it is none of them."""
    path = Path(where).expanduser()
    if path.is_file() and path.suffix != ".safetensors":
        raise UserError(f"{path} is no .safetensors file; kilobatch export makes one, or name a run's folder")
    return path if path.is_file() or is_checkpoint(path) else run_folder.find_run(where)


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
    if not is_checkpoint(path):
        return load_recipe(path / "recipe.yaml")[0]
    meta = _meta(path)
    if "recipe" not in meta:
        raise UserError(f"checkpoint {path} says nothing of its recipe; name one that `kilobatch train` has made")
    return recipe_from(meta["recipe"], str(path))


def _meta(checkpoint: Path) -> dict[str, Any]:
    try:
        return unsealed((checkpoint / DESCRIPTION).read_bytes())["meta"]
    except (OSError, ValueError) as error:
        raise UserError(f"checkpoint {checkpoint}: {DESCRIPTION} cannot be used: {error}; name another") from None


def metadata_of(file: Path) -> dict[str, str]:
    """The metadata of an exported file. Raises UserError where the file is not whole."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole .safetensors file ({error}); export or copy it again") from None


def recipe_in(metadata: Mapping[str, str], file: Path) -> Recipe:
    """The recipe in an exported file's metadata. Raises UserError where it holds none."""
    if "recipe" not in metadata:
        raise UserError(f"{file} says nothing of its recipe; name a file that `kilobatch export` or import has written")
    return recipe_from(json.loads(metadata["recipe"]), str(file))


def begun(run: Path) -> bool:
    """Whether a run's training has begun: its references then stand for the weights that it began with."""
    return (run / PINNED).exists() or bool(list_checkpoints(run / "checkpoints"))


def check_references(
    recipe: Recipe, awaited: Mapping[str, Recipe], refuse: Callable[[str, str], UserError], classes: int | None = None
) -> None:
    """Raises UserError, worded by refuse(option, message), for a reference that leads nowhere or does not fit.

    awaited: the recipes of the runs that will have been trained by then, by reference; their folders are not read.
    classes: of data.train; None: not known here.
    """
    for name, where in references(recipe).items():
        option = f"method.{name}"
        try:
            other = awaited[where] if where in awaited else recipe_of(where)
            if where not in awaited:
                _refuse_untrained(where)
        except UserError as error:
            raise refuse(option, f"{option} '{where}': {error}") from error
        encoder_only = where not in awaited and _holds_encoder_only(where)
        if name == "teacher":
            if encoder_only or not method_options.declared(other.method.name).classifies:
                made = "holds an encoder alone" if encoder_only else f"was trained by {other.method.name}"
                use = "kilobatch export --whole writes all" if encoder_only else "fine-tune it first, and name that run"
                raise refuse(option, f"{option} '{where}' {made}, which has no classifier to learn from; {use}")
            taught = 0 if where in awaited else _classes(where)
            if taught and classes and taught != classes:
                raise refuse(
                    option,
                    f"{option} '{where}' knows {taught} classes, and data.train '{recipe.data.train}' has {classes}; "
                    "let one teach that was fine-tuned on the same classes",
                )
        mine, theirs = recipe.data.views, other.data.views
        if (mine.mean, mine.std) != (theirs.mean, theirs.std):
            raise refuse(
                option,
                f"{option} '{where}' was trained on images with data.views.mean {_numbers(theirs.mean)} and std "
                f"{_numbers(theirs.std)}, here they are {_numbers(mine.mean)} and {_numbers(mine.std)}; "
                "set them as there",
            )
        if name == "start" and (differing := _differing(recipe.encoder, other.encoder)):
            raise refuse(
                option,
                f"{option} '{where}' has another encoder: {differing}; set these as there, or start from another run",
            )
        if name == "start" and hasattr(recipe.method, "layer"):
            _check_head(recipe.method, where, (0, None) if encoder_only else _head(other.method), refuse)


def _holds_encoder_only(where: str) -> bool:
    path = locate_reference(where)
    return path.is_file() and metadata_of(path).get("content") == "encoder"


def _classes(where: str) -> int:
    """The number of classes that a run, a checkpoint or a file was trained on; 0: it does not say."""
    path = locate_reference(where)
    if path.is_file():
        return int(metadata_of(path).get("classes", 0))
    if is_checkpoint(path):
        return _meta(path).get("classes", 0)
    for checkpoint in reversed(list_checkpoints(path / "checkpoints").values()):
        try:
            return _meta(checkpoint).get("classes", 0)
        except UserError:  # damaged: training passes over it, too, with a warning
            continue
    return 0


def _head(options: Any) -> tuple[int, int | None]:
    """The number of layers of a method's projection head, and the width of the projections that the last one makes;
    None where all are hidden layers."""
    declared = method_options.declared(options.name).head_layers
    layers = getattr(options, declared) if isinstance(declared, str) else declared
    return layers, options.dim if layers else None


def _check_head(
    options: Any, where: str, head: tuple[int, int | None], refuse: Callable[[str, str], UserError]
) -> None:
    try:
        refuse_layers(options.layer, options.dim, where, *head)
    except UserError as error:
        raise refuse("method.layer", str(error)) from error


def _numbers(values: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def _refuse_untrained(where: str) -> None:
    path = locate_reference(where)
    if path.is_dir() and not is_checkpoint(path) and not list_checkpoints(path / "checkpoints"):
        raise UserError(f"it has no checkpoint yet; train it first: kilobatch resume {path}")


def _differing(mine: EncoderOptions, theirs: EncoderOptions) -> str:
    """The options that decide on shapes and differ, in words; empty where none does."""
    ours, other = _shape_options(mine), _shape_options(theirs)
    found = [f"encoder.{name} {other[name]} there, {ours[name]} here" for name in ours if ours[name] != other[name]]
    return ", ".join(found)


def _shape_options(options: EncoderOptions) -> dict[str, object]:
    stem = options.stem if options.name.startswith("resnet") else None
    if options.sk_ratio and stem == "imagenet_same":
        stem = "imagenet"  # with selective kernels the two are the same network
    return {
        "name": options.name,
        "stem": stem,
        "width": options.times,
        "sk_ratio": options.sk_ratio,
    }
