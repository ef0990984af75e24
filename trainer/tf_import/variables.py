"""Converts SimCLR's and SimCLRv2's checkpoints (github.com/google-research/simclr, TensorFlow 1) to methods.

Variables are numbered in the order in which the authors' resnet.py makes them, a block's shortcut first:

    base_model/conv2d[_N]/kernel, base_model/batch_normalization[_N]/{gamma,beta,moving_mean,moving_variance}
    head_contrastive/nl_K/dense/kernel, head_contrastive/nl_K/batch_normalization/{…}, the last one's without beta
    head_supervised/linear_layer/dense/{kernel,bias}
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.methods.method import DataFacts, Method
from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import BOTTLENECKS, WIDEST, EncoderOptions
from kilobatch.methods.networks.resnet import LAYERS
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.methods.papers.simclr_v2 import SimCLRV2
from kilobatch.trainer.tf_import.bundle import Bundle

ENCODER, HEAD, CLASSIFIER = "base_model/", "head_contrastive/", "head_supervised/linear_layer/dense/"
SLOTS = ("Momentum", "Adam", "Adam_1", "ExponentialMovingAverage")  # last parts of optimizers' and averages' names
OF_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
KERNEL, MATRIX, VECTOR = (3, 2, 0, 1), (1, 0), (0,)  # axes in torch's order: HWIO -> OIHW, in x out -> out x in


@dataclass(frozen=True)
class Imported:
    """A method made from a checkpoint.

    encoder, method: sections of a recipe. tensors: by `method.` and the names of the method's state dict. classes: of
    the classifier, 0 without one. left_out: variables that were not used, except those of optimizers.
    """

    encoder: dict[str, Any]
    method: dict[str, Any]
    tensors: dict[str, Tensor]
    classes: int
    left_out: list[str]


def read_variables(bundle: Bundle, classifier_after: int | None, projections: bool) -> Imported:
    """Makes the checkpoint's method: an encoder with a projection head (simclr_v2), or with a classifier (finetune).

    The authors' checkpoints have both. Then either projections is true, or classifier_after says how many layers of the
    projection head are between encoder and classifier, which no variable tells. Raises UserError for other networks.
    """
    names = [name for name in bundle.entries if name.rpartition("/")[2] not in SLOTS]
    convs, norms = _numbered(names, r"conv2d"), _numbered(names, r"(?:sync_)?batch_normalization")
    if not convs:
        listed = ", ".join(sorted(names)[:3]) or "none at all"
        raise UserError(
            f"checkpoint {bundle.prefix} has no variables base_model/conv2d…, as those of google-research/simclr for "
            f"TensorFlow 1 have; it has {listed}"
        )
    layers = len({name.split("/")[1] for name in names if re.match(rf"{HEAD}nl_\d+/", name)})
    classes = _shape(bundle, CLASSIFIER + "kernel")[1] if CLASSIFIER + "kernel" in bundle.entries else 0
    after = _classifier_layer(bundle, layers, classes, classifier_after, projections)
    encoder = _encoder(bundle, convs)
    with torch.device("meta"):  # no memory yet
        method, section = _method(bundle, build_encoder(EncoderOptions.model_validate(encoder)), layers, classes, after)
        sources = dict(_sources(method, convs, norms))
        expected = method.state_dict()
    _check_shapes(bundle, expected, sources, [name for name in names if name.startswith(ENCODER)])
    tensors = {
        f"method.{name}": _tensor(bundle, *sources[name]) if name in sources else torch.zeros_like(empty, device="cpu")
        for name, empty in expected.items()
    }
    used = {source for source, _ in sources.values()}
    return Imported(
        encoder, section, tensors, 0 if after is None else classes, [name for name in names if name not in used]
    )


def describe_imported(imported: Imported) -> str:
    encoder, method = imported.encoder, imported.method
    wide = f" {encoder['width']} times as wide" if encoder["width"] > 1 else ""
    selective = f" with selective kernels of ratio {encoder['sk_ratio']:g}" if encoder["sk_ratio"] else ""
    if imported.classes:
        ending = f"{imported.classes} classes after {method['layer']} layers of its head"
        return f"{encoder['name']}{wide}{selective}, {ending}"
    return f"{encoder['name']}{wide}{selective}, a head of {method['layers']} layers to {method['dim']} dimensions"


def _numbered(names: list[str], kind: str) -> list[str]:
    """The layers of a kind, base_model/KIND and base_model/KIND_N, in the order of their numbers."""
    number_of: dict[str, int] = {}
    for name in names:
        if match := re.match(rf"({ENCODER}{kind}(?:_(\d+))?)/", name):
            number_of[match[1]] = int(match[2] or 0)
    return sorted(number_of, key=number_of.__getitem__)


def _shape(bundle: Bundle, name: str) -> tuple[int, ...]:
    if name not in bundle.entries:
        raise UserError(f"checkpoint {bundle.prefix} lacks variable '{name}'; copy it anew")
    return bundle.entries[name].shape


def _classifier_layer(bundle: Bundle, layers: int, classes: int, after: int | None, projections: bool) -> int | None:
    """How many layers of the head precede the classifier; None: the projection head is imported instead."""
    what = f"checkpoint {bundle.prefix} has a projection head of {layers} layers and a classifier of {classes} classes"
    if not layers and not classes:
        raise UserError(f"checkpoint {bundle.prefix} has neither {HEAD}nl_… nor {CLASSIFIER}kernel: no head to import")
    if projections and after is not None:
        raise UserError(f"--projections and --classifier-after {after} exclude each other; name one")
    if projections and not layers:
        raise UserError(f"{what}; leave out --projections")
    if after is not None and not classes:
        raise UserError(f"{what}; leave out --classifier-after")
    if after is not None and not 0 <= after <= layers:
        raise UserError(f"{what}, which can stand on 0 to {layers} of them; --classifier-after is {after}")
    if layers and classes and after is None and not projections:
        raise UserError(
            f"{what}; say which is meant: --projections for a pre-trained one, --classifier-after 1 for one that was "
            "fine-tuned from the head's first layer (its ft_proj_selector), --classifier-after 0 for a linear probe"
        )
    return None if projections or not classes else after or 0


def _encoder(bundle: Bundle, convs: list[str]) -> dict[str, Any]:
    """The recipe's section `encoder`, from the number of convolutions and the shapes of the first and the last."""
    first, last = (_shape(bundle, f"{conv}/kernel") for conv in (convs[0], convs[-1]))
    width = last[3] / 2048
    for name in BOTTLENECKS:
        blocks = sum(LAYERS[name][1])
        for selective in (False, True):
            three_conv_stem = selective and len(convs) == 5 * blocks + 7
            if len(convs) != (5 if selective else 3) * blocks + (7 if three_conv_stem else 5) or width not in range(
                1, WIDEST + 1
            ):
                continue
            squeezed = _shape(bundle, f"{convs[-3]}/kernel")[3] if selective else 0
            stem = "imagenet" if three_conv_stem else "cifar" if first[0] == 3 else "imagenet_same"
            return {"name": name, "stem": stem, "width": int(width), "sk_ratio": squeezed / (512 * width)}
    raise UserError(
        f"checkpoint {bundle.prefix} has {len(convs)} convolutions, the last of shape {last}: none of "
        f"{', '.join(BOTTLENECKS)}, 1 to {WIDEST} times as wide, with or without selective kernels, which are what is "
        "imported (the authors' ResNet-18 and 34 have one shortcut more than torchvision's)"
    )


def _method(
    bundle: Bundle, encoder: Any, layers: int, classes: int, after: int | None
) -> tuple[Method, dict[str, Any]]:
    """An empty method of the checkpoint's sizes, and its recipe's section."""
    wide = _shape(bundle, f"{HEAD}nl_0/dense/kernel")[1] if layers > 1 else encoder.features
    hidden = None if wide == encoder.features else wide  # a recipe's None means the encoder's width
    dim = _shape(bundle, f"{HEAD}nl_{layers - 1}/dense/kernel")[1] if layers else None
    if after is None:
        sizes: dict[str, Any] = {"dim": dim, "layers": layers, "hidden": hidden}
        return SimCLRV2(encoder, **sizes), {"name": "simclr_v2", **sizes}
    sizes = {"layer": after, "hidden": hidden, "dim": dim if after == layers else None}
    method = FineTune(encoder, **sizes)
    method.prepare(DataFacts(0, classes))
    return method, {"name": "finetune", **sizes}


def _sources(method: Method, convs: list[str], norms: list[str]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yields each tensor's name in the method's state dict, its variable, and that variable's axes in torch's order."""
    modules = _in_authors_order(method.encoder)
    ours = [name for name, module in modules if isinstance(module, nn.Conv2d)]
    for name, conv in zip(ours, convs, strict=True):
        yield f"encoder.{name}.weight", (f"{conv}/kernel", KERNEL)
    ours = [name for name, module in modules if isinstance(module, BatchNorm)]
    for name, norm in zip(ours, norms, strict=False):  # _check_shapes refuses a name that is left without a variable
        for attribute, variable in OF_NORM.items():
            yield f"encoder.{name}.{attribute}", (f"{norm}/{variable}", VECTOR)
    prefix, head = "head.layers", getattr(method, "head", None)
    if head is None:
        prefix = "hidden_layers"
        yield "classifier.weight", (CLASSIFIER + "kernel", MATRIX)
        yield "classifier.bias", (CLASSIFIER + "bias", VECTOR)
    layers: nn.Sequential = method.get_submodule(prefix)  # pyright: ignore[reportAssignmentType]
    for i, module in enumerate(layers):
        if isinstance(module, nn.Linear):
            yield f"{prefix}.{i}.weight", (f"{HEAD}nl_{i // 3}/dense/kernel", MATRIX)
        if isinstance(module, BatchNorm):
            for attribute, variable in OF_NORM.items():
                if attribute != "bias" or module.bias is not None:
                    yield f"{prefix}.{i}.{attribute}", (f"{HEAD}nl_{i // 3}/batch_normalization/{variable}", VECTOR)


def _in_authors_order(encoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """A ResNet's modules with their names, in the order in which the authors' code makes them."""
    order = [(name, module) for name, module in encoder.named_modules() if not name.startswith("layer")]
    for i in range(1, 5):
        for j, block in encoder.get_submodule(f"layer{i}").named_children():
            inside = sorted(block.named_modules(), key=lambda named: not named[0].startswith("downsample"))
            order += [(f"layer{i}.{j}.{name}", module) for name, module in inside]
    return order


def _check_shapes(
    bundle: Bundle, expected: dict[str, Tensor], sources: dict[str, tuple[str, tuple[int, ...]]], variables: list[str]
) -> None:
    """Raises UserError unless every tensor has a variable of its shape, and every one of the encoder's variables is
    used.

    variables: the encoder's, by name.
    """
    for name, tensor in expected.items():
        if name.endswith("num_batches_tracked"):
            continue
        source, axes = sources.get(name, ("", ()))
        if not source:
            raise UserError(f"checkpoint {bundle.prefix} has too few norms: none for {name}")
        shape = _shape(bundle, source)
        if len(shape) != len(axes) or tuple(shape[axis] for axis in axes) != tuple(tensor.shape):
            raise UserError(
                f"variable '{source}' of checkpoint {bundle.prefix} has shape {shape}, which does not fit {name} "
                f"{tuple(tensor.shape)}: another network than those of google-research/simclr"
            )
    if unknown := sorted(set(variables) - {source for source, _ in sources.values()}):
        raise UserError(
            f"checkpoint {bundle.prefix} has {len(unknown)} variables of an encoder that are not understood: "
            f"{', '.join(unknown[:3])}"
        )


def _tensor(bundle: Bundle, source: str, axes: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(bundle.read(source).transpose(axes).astype("float32", order="C"))
