"""Finds the tensors of an encoder in a file: the place, what stands before their names, and how these are spelled."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.methods.networks.weights.formats import format_of, package_of, spellings
from kilobatch.methods.networks.weights.state_file import Places


@dataclass(frozen=True)
class Found:
    """An encoder's tensors in a file. package: in words; place: keys and prefix, in front of their names; tensors: by
    the encoder's own names, of whatever shape; left: the others below the prefix, and parts: of those, what belongs to
    parts of the network that were found, such as further blocks."""

    package: str
    place: str
    tensors: Mapping[str, Tensor]
    left: Mapping[str, Tensor]
    parts: Mapping[str, Tensor]


def wanted_of(encoder: nn.Module) -> dict[str, Tensor]:
    """The tensors that an encoder needs, by name."""
    return {name: x for name, x in encoder.state_dict().items() if not name.endswith("num_batches_tracked")}


def find_tensors(places: Places, top: list[str], wanted: Mapping[str, Tensor], prefix: str | None = None) -> Found:
    """The tensors in the file that are the encoder's by name, from the place where most elements fit it.

    top: the file's keys; wanted: the encoder's tensors; prefix: what stands before the names, with or without the keys
    that lead to them; None: it is found. Raises UserError where the file has none of them, or has them twice.
    """
    shorter = _without_common_part(wanted)
    scores: dict[tuple[str, str], tuple[int, dict[str, str]]] = {}
    for spelling in spellings(shorter):
        back = {theirs: name for name, theirs in spelling.items()}
        for place, tensors in places.items():
            for before, elements in _fitting(tensors, back, shorter).items():
                if prefix in (None, before, place + before) and elements > scores.get((place, before), (0, {}))[0]:
                    scores[place, before] = elements, spelling
    if not scores:
        raise UserError(_nothing_fits(places, shorter, prefix))
    most = max(elements for elements, _ in scores.values())
    ranks = {key: format_of("".join(key), [*places[key[0]], *top]) for key, (n, _) in scores.items() if n == most}
    first = min(ranks.values())
    best = [key for key, rank in ranks.items() if rank == first]
    if len(best) > 1:
        listed = " and ".join(f"'{''.join(key)}'" for key in best[:3])
        choose = f"encoder.start_prefix={''.join(best[0])}"
        raise UserError(f"it holds this encoder {len(best)} times, at {listed}; choose one by {choose}, say")
    (place, before), own = best[0], dict(zip(shorter, wanted, strict=True))
    theirs = {before + other: own[name] for name, other in scores[best[0]][1].items()}
    below = {name: x for name, x in places[place].items() if name.startswith(before)}
    found = {theirs[name]: x for name, x in below.items() if name in theirs}
    left = {n: x for n, x in below.items() if n not in theirs and not n.endswith("num_batches_tracked")}
    heads = {name.removeprefix(before).partition(".")[0] for name in below if name in theirs}
    parts = {name: x for name, x in left.items() if name.removeprefix(before).partition(".")[0] in heads}
    return Found(package_of(first), place + before, found, left, parts)


def prefixes_holding(places: Places, wanted: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """The places in the file, and what stands before the names there, where each tensor of an encoder has its shape.
    wanted: the encoder's tensors."""
    shorter = _without_common_part(wanted)
    total, found = sum(x.numel() for x in shorter.values()), set[tuple[str, str]]()
    for spelling in spellings(shorter):
        back = {theirs: name for name, theirs in spelling.items()}
        for place, tensors in places.items():
            fitting = _fitting(tensors, back, shorter)
            found |= {(place, before) for before, elements in fitting.items() if elements == total}
    return sorted(found)


def _without_common_part(wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without the first part of the names, where it is that of all: a network inside of another module."""
    firsts = {name.partition(".")[0] for name in wanted}
    if len(firsts) == 1 and all("." in name for name in wanted):
        return _without_common_part({name.partition(".")[2]: x for name, x in wanted.items()})
    return dict(wanted)


def _fitting(tensors: Mapping[str, Tensor], back: Mapping[str, str], wanted: Mapping[str, Tensor]) -> dict[str, int]:
    """By what stands before the names: how many elements of the encoder have tensors of their shape."""
    found: dict[str, int] = defaultdict(int)
    for name, tensor in tensors.items():
        parts = name.split(".")
        for n in range(len(parts)):
            own = back.get(".".join(parts[n:]))
            if own is not None and tensor.shape == wanted[own].shape and tensor.is_floating_point():
                found[".".join([*parts[:n], ""]) if n else ""] += tensor.numel()
    return found


def _nothing_fits(places: Places, wanted: Mapping[str, Tensor], prefix: str | None) -> str:
    names = [place + name for place, tensors in places.items() for name in tensors]
    has = f"it holds {len(names)} tensors, such as '{names[0]}'"
    if prefix is not None and any(name.startswith(prefix) for name in names):
        has = f"below '{prefix}' it has other names or shapes"
    elif prefix is not None:
        has += f", and none below '{prefix}'"
    return f"{has}; the encoder needs {len(wanted)}, such as '{next(iter(wanted))}': name the encoder that it is of"


def is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
