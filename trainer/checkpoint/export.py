"""Exports the encoder of a checkpoint as a safetensors file with torchvision's names, or the whole method for other
runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.data.files import refusing_os_errors, write_whole
from kilobatch.data.loading.loader import describe_input, input_images
from kilobatch.data.views.options import Views
from kilobatch.methods.backbone_names import NETWORK, is_foreign, library_of
from kilobatch.methods.networks.resnet import torchvision_state_dict
from kilobatch.methods.networks.vit import PATCH, SIZES, torchvision_vit_state_dict
from kilobatch.trainer.checkpoint.description import is_checkpoint
from kilobatch.trainer.checkpoint.exported_file import seal
from kilobatch.trainer.checkpoint.reader import Saved, newest, open_saved

METHOD = "method."


def export(
    source: Path, out: Path, *, force: bool = False, whole: bool = False, report: Callable[[str], None]
) -> dict[str, str]:
    """Writes the encoder of a run's newest whole checkpoint, or of one checkpoint, to out; returns its metadata but for
    the checksum.

    source: a run folder, its `checkpoints` folder or a checkpoint folder. A plain ResNet with the ImageNet stem loads
    strictly into torchvision's model of that name, and a ViT into torchvision's VisionTransformer, with a classifier of
    zeros, which the encoder does not have; any other encoder has its own names and no classifier, and a network of
    timm loads strictly into timm's. The file's metadata
    says how images are to be prepared, as data.loading.loader.input_images does and in words (`preprocess`), the names
    of the classes in order, the recipe, the step, and what the file loads into.
    whole: exports the whole method instead, for another run to start from or be taught by: its state dict with
    `method.` before each name, without the tensors that differ by rank, such as a sharded queue.
    report: called with a message for each damaged checkpoint that is passed over. Raises UserError.
    """
    check_out(out, force)
    saved = _open(source, report)
    recipe = saved.meta.get("recipe")
    if recipe is None:
        raise UserError(
            f"checkpoint {saved.folder} says nothing of its recipe; export one that `kilobatch train` has made"
        )
    if whole:
        tensors = {name: saved.whole(name) for name in saved.names() if name.startswith(METHOD)}
        metadata = whole_metadata(recipe, saved.step, saved.meta.get("images", 0), saved.meta.get("classes", 0))
        metadata |= _class_names(saved)
    else:
        prefix = f"{METHOD}{saved.meta.get('kept', 'encoder')}."  # earlier versions kept `encoder` of any method
        tensors = {name.removeprefix(prefix): saved.whole(name) for name in saved.names() if name.startswith(prefix)}
        tensors, loads_into = _with_public_names(tensors, recipe["encoder"], first_group(recipe)["size"])
        metadata = _metadata(recipe, saved.step, "encoder", loads_into) | _class_names(saved)
    write(out, tensors, metadata)
    return metadata


def whole_metadata(recipe: dict[str, Any], step: int, images: int, classes: int) -> dict[str, str]:
    """The metadata of a file with a whole method. images, classes: of the data that it was trained on; 0: unknown."""
    metadata = _metadata(recipe, step, "method", f"kilobatch, as method {recipe['method']['name']}")
    return {**metadata, "images": str(images), "classes": str(classes)}


def first_group(recipe: dict[str, Any]) -> dict[str, Any]:
    """The options of the first group of views, by which images are prepared for the encoder."""
    views = recipe["data"]["views"]
    return views[0] if isinstance(views, list) else views


def _metadata(recipe: dict[str, Any], step: int, content: str, loads_into: str) -> dict[str, str]:
    options = ("size", "mean", "std", "interpolation")  # that last one is absent in recipes of earlier versions
    views = Views.model_validate({name: value for name, value in first_group(recipe).items() if name in options})
    prepared = input_images(views)
    return {
        "format": "pt",
        "content": content,
        "loads_into": loads_into,
        "encoder": recipe["encoder"]["name"],
        "method": recipe["method"]["name"],
        "step": str(step),
        **{name: json.dumps(value) for name, value in prepared.items()},
        "preprocess": describe_input(prepared),
        "recipe": json.dumps(recipe),
    }


def _class_names(saved: Saved) -> dict[str, str]:
    """Metadata with the names of the classes; empty for a checkpoint of an earlier version, which does not say them."""
    return {"class_names": json.dumps(saved.meta["class_names"])} if "class_names" in saved.meta else {}


def _with_public_names(tensors: dict[str, Tensor], encoder: dict[str, Any], size: int) -> tuple[dict[str, Tensor], str]:
    """The encoder's tensors, with torchvision's names where it has this network, and the model that they load into."""
    name, sk_ratio = encoder["name"], encoder.get("sk_ratio", 0.0)
    if is_foreign(name):
        return {key.removeprefix(NETWORK): x for key, x in tensors.items()}, _foreign(name, encoder["options"] or {})
    if name.startswith("resnet") and encoder["stem"] == "imagenet":
        width = len(tensors["bn1.weight"]) // 64
        if width == 1 and not sk_ratio:
            return torchvision_state_dict(tensors), f"torchvision.models.{name}"
        arguments = f"{name.removeprefix('resnet')}, width={width}, sk_ratio={sk_ratio:g}"
        return tensors, f"kilobatch.methods.networks.resnet.resnet({arguments})"
    if name in SIZES:
        features, blocks, heads = SIZES[name]
        return torchvision_vit_state_dict(tensors, size), (
            f"torchvision.models.VisionTransformer(image_size={size}, patch_size={PATCH}, "
            f"num_layers={blocks}, num_heads={heads}, hidden_dim={features}, mlp_dim={4 * features})"
        )
    return tensors, "kilobatch.methods.networks.build.build_encoder"


def _foreign(name: str, options: dict[str, Any]) -> str:
    """The network of a library or of a user's file that tensors load into."""
    library, _, model = name.partition("/")
    given = "".join(f", {key}={value!r}" for key, value in options.items())
    if library_of(name) == "timm":
        return f"timm.create_model('{model}', num_classes=0{given})"
    if library_of(name) == "torchvision":
        return f"torchvision.models.get_model('{model}'{given}), but for its classifier"
    return f"{name}({given.removeprefix(', ')})"


def check_out(out: Path, force: bool) -> None:
    """Raises UserError unless out can be written as a new .safetensors file."""
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file in it, such as {out / 'encoder.safetensors'}")
    if out.suffix != ".safetensors":
        raise UserError(f"{out} ends in '{out.suffix}'; only safetensors is written: {out.with_suffix('.safetensors')}")
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is no folder; make it first")
    if out.exists() and not force:
        raise UserError(f"{out} exists; choose another name, or replace it with --force")


def _open(source: Path, report: Callable[[str], None]) -> Saved:
    if is_checkpoint(source):
        return open_saved(source)
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    path = newest(folder, report)
    if path is None:
        raise UserError(f"{source} holds no checkpoint; name a run folder or one of its checkpoints")
    return open_saved(path, verify=False)  # newest has just verified it


def write(out: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes the file with a checksum, whole or not at all. Raises UserError where it cannot be written."""
    with refusing_os_errors(out):
        write_whole(out, seal(save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)))
