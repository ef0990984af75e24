"""Networks of timm and torchvision, built without weights from anywhere and without their classifier."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.methods.backbone_names import RESERVED, check_name
from kilobatch.methods.networks.backbones.probe import is_fake

DEFAULT_SIZE = 224
OWN_TO_SIZE = "img_size", "image_size"  # arguments by which networks are made for images of one size


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The network of a library, freshly initialised. Raises UserError for a name or an option that it has not."""
    check_name(name)
    library, _, model = name.partition("/")
    make = _timm if library == "timm" else _torchvision
    if not is_fake():
        return make(name, model, dict(options))
    # Builders read numbers out of tensors, such as the rates of drop path, and tensors without data have none.
    with _disable_current_modes(), torch.device("meta" if library == "timm" else "cpu"):
        network = make(name, model, dict(options))
    return without_data(network)


def default_size(network: nn.Module, options: Mapping[str, Any]) -> int:
    """Pixels of the images that the network was made for."""
    sizes = [options[name] for name in OWN_TO_SIZE if name in options]
    sizes += [getattr(network, "pretrained_cfg", {}).get("input_size", (3, DEFAULT_SIZE))[-1]]
    return max(sizes[0]) if isinstance(sizes[0], list) else sizes[0]


def _timm(name: str, model: str, options: dict[str, Any]) -> nn.Module:
    timm: Any = importlib.import_module("timm")
    fixed = {"pretrained": False, "num_classes": 0}
    with torch.device("meta"):  # the class alone is wanted, to see what it takes
        cls = type(timm.create_model(model, **fixed))
    if "dynamic_img_size" in inspect.signature(cls).parameters:
        fixed["dynamic_img_size"] = True  # positions are interpolated for images of other sizes
    return _made(lambda **given: timm.create_model(model, **given), name, cls, fixed | options, options)


def _torchvision(name: str, model: str, options: dict[str, Any]) -> nn.Module:
    builder = importlib.import_module("torchvision.models").get_model_builder(model)
    fixed: dict[str, Any] = {"weights": None}
    if model in ("googlenet", "inception_v3"):
        fixed |= {"aux_logits": False, "init_weights": True}  # without the classifiers on the way
    network = _made(builder, name, None, fixed | options, options)
    _remove_classifier(name, network)
    return network


def _made(build: Any, name: str, cls: type | None, arguments: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """build(**arguments). options: those of the recipe; cls: of the network, if it is known. Raises UserError for what
    the network does not take."""
    if not options:
        return build(**arguments)
    try:
        return build(**arguments)
    except Exception as error:
        if cls is None:  # torchvision's builders do not say it
            cls = type(build(**{key: value for key, value in arguments.items() if key not in options}))
        known = [p for p in inspect.signature(cls).parameters if p not in (*RESERVED, "kwargs", "args", "cfg")]
        wrong = [option for option in options if option not in known]
        guess = did_you_mean(wrong[0], known) if wrong else f"; known: {', '.join(known)}"
        raise UserError(f"encoder.options of {name} cannot be used ({type(error).__name__}: {error}){guess}") from error


def _remove_classifier(name: str, network: nn.Module) -> None:
    """Takes the last linear layer out of torchvision's network, and a dropout before it."""
    head = next((part for part in ("fc", "classifier", "heads", "head") if hasattr(network, part)), None)
    linear = [key for key, m in network.named_modules() if isinstance(m, nn.Linear) and key.partition(".")[0] == head]
    if head is None or not linear:
        raise UserError(f"{name} ends in no linear classifier that could be taken out; use another network")
    network.set_submodule(linear[-1], nn.Identity())
    parent, _, key = linear[-1].rpartition(".")
    siblings = list(network.get_submodule(parent).named_children()) if parent else []
    before = [sibling for place, sibling in enumerate(siblings[:-1]) if siblings[place + 1][0] == key]
    if before and isinstance(before[0][1], nn.Dropout):
        network.set_submodule(f"{parent}.{before[0][0]}", nn.Identity())


def without_data(network: nn.Module) -> nn.Module:
    """The network with tensors of the present kind, without data, in place of its own; shared ones stay shared."""
    made: dict[int, Tensor] = {}

    def like(x: Tensor) -> Tensor:
        if id(x) not in made:
            bare = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
            made[id(x)] = nn.Parameter(bare, x.requires_grad) if isinstance(x, nn.Parameter) else bare
        return made[id(x)]

    for module in network.modules():
        for tensors in (module._parameters, module._buffers):
            for key, x in tensors.items():
                tensors[key] = None if x is None else like(x)  # pyright: ignore[reportArgumentType]
    return network


def stages(network: Any, images: Tensor) -> list[Tensor]:
    """Maps (N, C, h, w) of the network's stages, the last of each size, the coarsest last. Raises UserError for a
    network that has no maps."""
    if hasattr(network, "forward_intermediates"):  # timm's
        maps = network.forward_intermediates(images, output_fmt="NCHW", intermediates_only=True)
    elif all(hasattr(network, part) for part in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer4")):
        x = network.maxpool(network.relu(network.bn1(network.conv1(images))))  # torchvision's ResNets
        maps = [x := network.get_submodule(f"layer{i}")(x) for i in range(1, 5)]
    else:
        raise UserError(
            f"{type(network).__name__} says nothing of its maps, and the method reads maps of stages; use one that "
            "has them, such as resnet50, or a network of timm"
        )
    return [
        x for x, after in zip(maps, [*maps[1:], None], strict=True) if after is None or after.shape[2:] != x.shape[2:]
    ]
