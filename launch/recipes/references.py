"""What a recipe takes from other runs: where it lies, and whether it fits. Loads no torch.

A reference is a run (its folder, or its name under runs/), one of its checkpoints, or an exported .safetensors file.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open

from kilobatch.data.errors import Refusal
from kilobatch.launch.recipes import method_options, recipe
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.runs import run_folder as runs
from kilobatch.methods.networks.options import EncoderOptions, refuse_layers
from kilobatch.methods.options import Reference
from kilobatch.trainer.checkpoint.description import DESCRIPTION, is_checkpoint, unsealed

PINNED = "trained.json"  # in a run's folder: the files that its references stood for when it began


def references(chosen: Recipe) -> dict[str, str]:
    """The references of the recipe's method, by the option's name: `start`, starting weights, and `teacher`."""
    kinds = {name: kind for name, (kind, _) in method_options.declared(chosen.method.name).arguments.items()}
    names = [name for name, kind in kinds.items() if Reference in (kind, *get_args(kind))]
    return {name: where for name in names if (where := getattr(chosen.method, name)) is not None}


def place(where: str) -> Path:
    """A run's folder, a checkpoint's or a file. Raises Refusal where there is none of them."""
    path = Path(where).expanduser()
    if path.is_file() and path.suffix != ".safetensors":
        raise Refusal(f"{path} is no .safetensors file; kilobatch export makes one, or name a run's folder")
    return path if path.is_file() or is_checkpoint(path) else runs.find(where)


def absolute(where: str) -> str:
    """The same, named so that the folder which a program stands in does not matter."""
    paths = Path(where).expanduser(), runs.FOLDER / where
    return str(next((path for path in paths if path.exists()), paths[0]).absolute())


def recipe_of(where: str) -> Recipe:
    """What a run, a checkpoint or an exported file was trained with. Raises Refusal."""
    path = place(where)
    if path.is_file():
        return recipe_in(metadata_of(path), path)
    if not is_checkpoint(path):
        return recipe.load(path / "recipe.yaml")[0]
    meta = _meta(path)
    if "recipe" not in meta:
        raise Refusal(f"checkpoint {path} says nothing of its recipe; name one that `kilobatch train` has made")
    return recipe.given(meta["recipe"], str(path))


def _meta(checkpoint: Path) -> dict[str, Any]:
    try:
        return unsealed((checkpoint / DESCRIPTION).read_bytes())["meta"]
    except (OSError, ValueError) as error:
        raise Refusal(f"checkpoint {checkpoint}: {DESCRIPTION} cannot be used: {error}; name another") from None


def metadata_of(file: Path) -> dict[str, str]:
    """What an exported file says of itself. Raises Refusal where it is not whole."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise Refusal(f"{file} is no whole .safetensors file ({error}); export or copy it again") from None


def recipe_in(metadata: Mapping[str, str], file: Path) -> Recipe:
    if "recipe" not in metadata:
        raise Refusal(f"{file} says nothing of its recipe; name a file that `kilobatch export` or import has written")
    return recipe.given(json.loads(metadata["recipe"]), str(file))


def begun(run: Path) -> bool:
    """Whether training has begun, so that references stand for what they stood for then."""
    return (run / PINNED).exists() or any((run / "checkpoints").glob("step-*"))


def check(
    chosen: Recipe, awaited: Mapping[str, Recipe], refuse: Callable[[str, str], Refusal], classes: int | None = None
) -> None:
    """Raises Refusal, worded by refuse(option, message), for a reference that leads nowhere or does not fit.

    awaited: the recipes of the runs that will have been trained by then, by reference; they are not looked for.
    classes: of data.train; None: not known here.
    """
    for name, where in references(chosen).items():
        option = f"method.{name}"
        try:
            other = awaited[where] if where in awaited else recipe_of(where)
            if where not in awaited:
                _refuse_untrained(where)
        except Refusal as refusal:
            raise refuse(option, f"{option} '{where}': {refusal}") from refusal
        alone = where not in awaited and _holds_an_encoder_alone(where)
        if name == "teacher":
            if alone or not method_options.declared(other.method.name).classifies:
                made = "holds an encoder alone" if alone else f"was trained by {other.method.name}"
                use = "kilobatch export --whole writes all" if alone else "fine-tune it first, and name that run"
                raise refuse(option, f"{option} '{where}' {made}, which has no classifier to learn from; {use}")
            known = 0 if where in awaited else _classes(where)
            if known and classes and known != classes:
                raise refuse(
                    option,
                    f"{option} '{where}' knows {known} classes, and data.train '{chosen.data.train}' has {classes}; "
                    "let one teach that was fine-tuned on the same classes",
                )
        mine, theirs = chosen.data.views, other.data.views
        if (mine.mean, mine.std) != (theirs.mean, theirs.std):
            raise refuse(
                option,
                f"{option} '{where}' was trained on images with data.views.mean {_numbers(theirs.mean)} and std "
                f"{_numbers(theirs.std)}, here they are {_numbers(mine.mean)} and {_numbers(mine.std)}; "
                "set them as there",
            )
        if name == "start" and (differing := _differing(chosen.encoder, other.encoder)):
            raise refuse(
                option,
                f"{option} '{where}' has another encoder: {differing}; set these as there, or start from another run",
            )
        if name == "start" and hasattr(chosen.method, "layer"):
            _check_head(chosen.method, where, (0, None) if alone else _head(other.method), refuse)


def _holds_an_encoder_alone(where: str) -> bool:
    path = place(where)
    return path.is_file() and metadata_of(path).get("content") == "encoder"


def _classes(where: str) -> int:
    """How many what lies there tells apart; 0: it does not say."""
    path = place(where)
    if path.is_file():
        return int(metadata_of(path).get("classes", 0))
    if is_checkpoint(path):
        return _meta(path).get("classes", 0)
    for checkpoint in sorted((path / "checkpoints").glob("step-*"), reverse=True):
        try:
            return _meta(checkpoint).get("classes", 0)
        except Refusal:  # damaged: training passes over it, too, and says so
            continue
    return 0


def _head(options: Any) -> tuple[int, int | None]:
    """Layers of the projection head that a method of these options has, and the width of the projections that the last
    makes; None where all are hidden."""
    said = method_options.declared(options.name).head_layers
    layers = getattr(options, said) if isinstance(said, str) else said
    return layers, options.dim if layers else None


def _check_head(options: Any, where: str, head: tuple[int, int | None], refuse: Callable[[str, str], Refusal]) -> None:
    try:
        refuse_layers(options.layer, options.dim, where, *head)
    except Refusal as refusal:
        raise refuse("method.layer", str(refusal)) from refusal


def _numbers(values: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{value:g}' for value in values)}]"


def _refuse_untrained(where: str) -> None:
    path = place(where)
    if path.is_dir() and not is_checkpoint(path) and not any((path / "checkpoints").glob("step-*")):
        raise Refusal(f"it has no checkpoint yet; train it first: kilobatch resume {path}")


def _differing(mine: EncoderOptions, theirs: EncoderOptions) -> str:
    """What decides on shapes and differs, in words; empty where nothing does."""
    here, there = _shaping(mine), _shaping(theirs)
    found = [f"encoder.{name} {there[name]} there, {here[name]} here" for name in here if here[name] != there[name]]
    return ", ".join(found)


def _shaping(options: EncoderOptions) -> dict[str, object]:
    stem = options.stem if options.name.startswith("resnet") else None
    if options.sk_ratio and stem == "imagenet_same":
        stem = "imagenet"  # with selective kernels the two are the same network
    return {
        "name": options.name,
        "stem": stem,
        "width": options.times,
        "sk_ratio": options.sk_ratio,
    }
