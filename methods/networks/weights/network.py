"""Tells which of our networks a file of another package holds, and its classifier: for teachers, of which no recipe
says the network."""

from itertools import product

import torch
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import WIDEST, EncoderOptions
from kilobatch.methods.networks.resnet import LAYERS
from kilobatch.methods.networks.vit import SIZES
from kilobatch.methods.networks.weights.matching import find_tensors, wanted_of
from kilobatch.methods.networks.weights.report import StartReport
from kilobatch.methods.networks.weights.state_file import Places

CLASSIFIERS = ("fc", "head", "heads.head", "linear", "classifier", "module.fc")


def network_of(places: Places, top: list[str]) -> EncoderOptions:
    """The options of the network of ours whose tensors are all in the file, with nothing left of its parts. Raises
    UserError where there is none."""
    for options in candidates(places):
        with torch.device("meta"):  # no memory, and no random numbers
            wanted = wanted_of(build_encoder(options))
        try:
            found = find_tensors(places, top, wanted)
        except UserError:
            continue
        positions = {name for name in found.parts if name.endswith("pos_embedding")}
        whole = all(name in found.tensors and found.tensors[name].shape == x.shape for name, x in wanted.items())
        if whole and not found.parts.keys() - positions:
            return options
    raise UserError(
        "it holds none of kilobatch's own networks, as far as can be told; say which it is: "
        "method.teacher_network=resnet50, timm/NAME or torchvision/NAME"
    )


def candidates(places: Places) -> list[EncoderOptions]:
    """The networks of ours whose first convolution has the shape of a tensor in the file."""
    stems = {tuple(x.shape) for tensors in places.values() for x in tensors.values() if x.ndim == 4 and x.shape[1] == 3}
    found: list[EncoderOptions] = []
    for (stem, side), width, name in product((("imagenet", 7), ("cifar", 3)), range(1, WIDEST + 1), LAYERS):
        if (64 * width, 3, side, side) in stems:
            found.append(EncoderOptions.model_validate({"name": name, "stem": stem, "width": width}))
    found += [EncoderOptions.model_validate({"name": n}) for n, (d, _, _) in SIZES.items() if (d, 3, 16, 16) in stems]
    convnets = [shape[0] for shape in stems if shape[1:] == (3, 3, 3)]
    return found + [EncoderOptions.model_validate({"name": "convnet", "width": width}) for width in convnets]


def classifier_of(places: Places, loaded: StartReport) -> tuple[Tensor, Tensor] | None:
    """Weight (classes, D) and bias (classes,) of the linear layer beside an encoder that was loaded; None: there is
    none."""
    everything = {place + name: x for place, tensors in places.items() for name, x in tensors.items()}
    for name in CLASSIFIERS:
        prefix = f"{loaded.place}{name}."
        weight, bias = everything.get(f"{prefix}weight"), everything.get(f"{prefix}bias")
        if weight is not None and bias is not None and weight.ndim == 2 and len(weight) == len(bias) > 1:
            return weight, bias
    return None
