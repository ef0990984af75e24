"""Starts an encoder with the weights that a file holds, and says what was loaded, left and missing."""

from collections.abc import Mapping
from dataclasses import replace
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.methods.networks.vit import PATCH, ViT, positions
from kilobatch.methods.networks.weights.matching import Found, find_tensors, is_finite, wanted_of
from kilobatch.methods.networks.weights.report import StartReport, names_of_some, percent
from kilobatch.methods.networks.weights.state_file import Places

POSITIONS = ("pos_embed", "pos_embedding")  # timm's and torchvision's, (1, 1 + patches, D) or (1, patches, D)


@torch.no_grad()
def start_encoder(
    encoder: nn.Module, places: Places, top: list[str], least: float, prefix: str | None = None
) -> StartReport:
    """Copies the tensors of a file into an encoder where their shapes are the encoder's, in the encoder's type.

    places, top: of state_file.read_places; least: the share of the encoder's parameters that have to be there, and of
    what the file has for the same parts of the network that has to be used; prefix: as find_tensors has it. Raises
    UserError, and changes nothing, where there is less, for positions that the encoder cannot take, and for values that
    are not finite.
    """
    wanted = wanted_of(encoder)
    found = find_tensors(places, top, wanted, prefix)
    if isinstance(encoder, ViT):
        found = with_fixed_positions(found, encoder.features)
    taken, resized = dict[str, Tensor](), list[str]()
    for name, tensor in found.tensors.items():
        if tensor.shape == wanted[name].shape:
            taken[name] = tensor
        elif name.rpartition(".")[2] in POSITIONS:
            taken[name] = resize_positions(tensor, wanted[name].shape)
            resized.append(name)
    missing = [name for name in wanted if name not in taken]
    share = _share(taken, encoder)
    used = sum(x.numel() for x in taken.values())
    unused = sum(x.numel() for x in found.parts.values())
    if share < least or used < least * (used + unused):
        raise UserError(_too_little(found, wanted, missing, share, used / max(1, used + unused), least))
    if wrong := next((name for name, x in taken.items() if not is_finite(x)), None):
        raise UserError(f"{wrong} has values that are not finite: the training that wrote it had diverged")
    for name, tensor in taken.items():
        wanted[name].copy_(tensor)
    described = [_of_other_shape(name, found, wanted) for name in missing]
    return StartReport(
        package=found.package,
        place=found.place,
        tensors=len(taken),
        share=share,
        left=list(found.left),
        missing=described,
        resized=resized,
    )


def resize_positions(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Learnt positions (1, T + S * S, D) as `shape` (1, T + S' * S', D): those of the grid by bicubic interpolation
    with antialiasing, as timm does; those of the T other tokens, such as the class token, as they are. Raises UserError
    where the two are no such shapes."""
    for tokens in range(8):  # DINOv2 has a class token and four registers
        old, new = (isqrt(max(0, n - tokens)) for n in (tensor.shape[1], shape[1]))
        if min(old, new) > 0 and (old**2, new**2) == (tensor.shape[1] - tokens, shape[1] - tokens):
            break
    else:
        raise UserError(f"positions {tuple(tensor.shape)} cannot be brought to {tuple(shape)}: no square grids")
    if tensor.shape[2] != shape[2]:
        raise UserError(f"positions {tuple(tensor.shape)} are of another width than the encoder's {tuple(shape)}")
    grid = tensor[:, tokens:].float().unflatten(1, (old, old)).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (new, new), mode="bicubic", antialias=True)
    return torch.cat([tensor[:, :tokens].float(), resized.flatten(2).transpose(1, 2)], 1)


def with_fixed_positions(found: Found, features: int) -> Found:
    """The same without positions, which a ViT of ours computes. Raises UserError where those of the file are others."""
    left = dict(found.left)
    for name in list(left):
        if name.rpartition(".")[2] not in POSITIONS:
            continue
        tensor = left.pop(name)
        side = isqrt(max(0, tensor.shape[1] - 1))
        fixed = positions(side, features, tensor.device)
        if fixed.shape != tensor.shape or not torch.allclose(fixed, tensor.float(), atol=1e-3):
            raise UserError(
                f"'{name}' are learnt positions, and a ViT of kilobatch has fixed sines and cosines, as MoCo v3's has; "
                f"use encoder.name=timm/NAME or torchvision/NAME for patches of {PATCH} with learnt positions"
            )
    parts = {name: x for name, x in found.parts.items() if name in left}
    return replace(found, left=left, parts=parts)


def _share(taken: Mapping[str, Tensor], encoder: nn.Module) -> float:
    sizes = {name: p.numel() for name, p in encoder.named_parameters()}
    return sum(size for name, size in sizes.items() if name in taken) / max(1, sum(sizes.values()))


def _too_little(
    found: Found, wanted: Mapping[str, Tensor], missing: list[str], share: float, used: float, least: float
) -> str:
    at = f"of {found.package}{f', at {found.place}' if found.place else ''}"
    way_out = "name the encoder that the file is of (encoder.name, stem, width), or, where this is meant, use "
    if share < least:
        listed = names_of_some([_of_other_shape(name, found, wanted) for name in missing])
        return (
            f"only {percent(share)} of the encoder's parameters are in it ({at}), and encoder.start_share is "
            f"{percent(least)}; missing {listed}; {way_out}encoder.start_share={int(share * 100) / 100:g}"
        )
    return (
        f"only {percent(used)} of its encoder would be used ({at}), and encoder.start_share is {percent(least)}; "
        f"left {names_of_some(list(found.parts))}: it is of a deeper network; {way_out}"
        f"encoder.start_share={int(used * 100) / 100:g}"
    )


def _of_other_shape(name: str, found: Found, wanted: Mapping[str, Tensor]) -> str:
    if name not in found.tensors:
        return name
    there, here = (tuple(x.shape) for x in (found.tensors[name], wanted[name]))
    return f"{name} ({_times(there)} there, {_times(here)} here)"


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
