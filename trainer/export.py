"""An encoder out of a checkpoint, in one file that other programs read: safetensors with torchvision's names."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from data.refusal import Refusal
from methods.resnet import torchvision_state_dict
from methods.vit import PATCH, SIZES, torchvision_vit_state_dict
from trainer.files import in_words, write_whole
from trainer.saved import DESCRIPTION, Saved, newest, open_saved

PREFIX = "method.encoder."


def export(source: Path, out: Path, *, force: bool = False, report: Callable[[str], None]) -> dict[str, str]:
    """Writes the encoder of a run's newest whole checkpoint, or of one checkpoint, to out; returns its metadata.

    source: a run folder, its `checkpoints` folder or a checkpoint folder. A ResNet with the ImageNet stem loads
    strictly into torchvision's model of that name, and a ViT into torchvision's VisionTransformer, with a classifier of
    zeros, which the encoder does not have; any other encoder has its own names and no classifier. The file's metadata
    says how images are to be prepared: size (pixels), mean and std (of 0..1), and the recipe, step, and what the file
    loads into.
    report: told of the damaged checkpoints that are passed over. Raises Refusal.
    """
    _check_out(out, force)
    saved = _open(source, report)
    recipe = saved.meta.get("recipe")
    if recipe is None:
        raise Refusal(
            f"checkpoint {saved.folder} says nothing of its recipe; export one that `kilobatch train` has made"
        )
    encoder, views = recipe["encoder"], recipe["data"]["views"]
    tensors = {name.removeprefix(PREFIX): saved.whole(name) for name in saved.names() if name.startswith(PREFIX)}
    loads_into = "methods.encoders.build"
    if encoder["name"].startswith("resnet") and encoder["stem"] == "imagenet":
        tensors, loads_into = torchvision_state_dict(tensors), f"torchvision.models.{encoder['name']}"
    elif encoder["name"] in SIZES:
        features, blocks, heads = SIZES[encoder["name"]]
        tensors = torchvision_vit_state_dict(tensors, views["size"])
        loads_into = (
            f"torchvision.models.VisionTransformer(image_size={views['size']}, patch_size={PATCH}, "
            f"num_layers={blocks}, num_heads={heads}, hidden_dim={features}, mlp_dim={4 * features})"
        )
    metadata = {
        "format": "pt",
        "loads_into": loads_into,
        "encoder": encoder["name"],
        "method": recipe["method"]["name"],
        "step": str(saved.step),
        **{name: json.dumps(views[name]) for name in ("size", "mean", "std")},
        "recipe": json.dumps(recipe),
    }
    _write(out, tensors, metadata)
    return metadata


def _check_out(out: Path, force: bool) -> None:
    if out.is_dir():
        raise Refusal(f"{out} is a folder; name a file in it, such as {out / 'encoder.safetensors'}")
    if out.suffix != ".safetensors":
        raise Refusal(f"{out} ends in '{out.suffix}'; only safetensors is written: {out.with_suffix('.safetensors')}")
    if not out.parent.is_dir():
        raise Refusal(f"{out.parent} is no folder; make it first")
    if out.exists() and not force:
        raise Refusal(f"{out} exists; choose another name, or replace it with --force")


def _open(source: Path, report: Callable[[str], None]) -> Saved:
    if (source / DESCRIPTION).exists() or (source.is_dir() and source.name.startswith("step-")):
        return open_saved(source)
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    path = newest(folder, report)
    if path is None:
        raise Refusal(f"{source} holds no checkpoint; name a run folder or one of its checkpoints")
    return open_saved(path, verify=False)  # newest has just verified it


def _write(out: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        write_whole(out, [save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)])
    except OSError as error:
        raise Refusal(f"{out} could not be written: {in_words(error)}") from error
