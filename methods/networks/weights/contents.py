"""Lists the encoders in a file of any package: where they lie, whose they are, and which network of ours they are."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.networks.vit import ViT
from kilobatch.methods.networks.weights.formats import FORMATS, format_of, package_of
from kilobatch.methods.networks.weights.matching import find_tensors, prefixes_holding, wanted_of
from kilobatch.methods.networks.weights.network import candidates
from kilobatch.methods.networks.weights.start import with_fixed_positions
from kilobatch.methods.networks.weights.state_file import Places

STATE_DICT = len(FORMATS) - 1  # the last format, which every state dict has


@dataclass(frozen=True)
class HeldEncoder:
    """An encoder in a file. place: what encoder.start_prefix calls it; number: of its format, len(FORMATS) if none;
    tensors: how many; options: of the network of ours that it is; None: it is none of these, as far as can be told."""

    place: str
    number: int
    tensors: int
    options: EncoderOptions | None

    @property
    def package(self) -> str:
        return package_of(self.number)


def encoders_in(places: Places, top: list[str]) -> list[HeldEncoder]:
    """The encoders in a file, those that encoder.start prefers first. places, top: of state_file.read_places.

    Where none is a network of ours whole, it is what lies where a package that is known has its encoder; else what lies
    where any state dict has one.
    """
    found = list(_own(places, top)) or list(_others(places, top))
    return sorted(found, key=lambda held: (held.number, held.place))


def _own(places: Places, top: list[str]) -> Iterator[HeldEncoder]:
    for options in candidates(places):
        with torch.device("meta"):  # no memory, and no random numbers
            encoder = build_encoder(options)
        wanted = wanted_of(encoder)
        for place, before in prefixes_holding(places, wanted):
            try:
                found = find_tensors({place: places[place]}, top, wanted, before)
                if isinstance(encoder, ViT):
                    found = with_fixed_positions(found, encoder.features)
            except UserError:  # of learnt positions, which no network of ours has
                continue
            if not found.parts:  # else it is a deeper network
                number = format_of(place + before, [*places[place], *top])
                yield HeldEncoder(place + before, number, len(found.tensors), options)


def _others(places: Places, top: list[str]) -> Iterator[HeldEncoder]:
    counts: Counter[tuple[int, str]] = Counter()
    for place, tensors in places.items():
        beside = [*tensors, *top]
        numbers: dict[str, int] = {}  # of a format, by what stands before names
        for name in tensors:
            parts = name.split(".")
            befores = ["", *(".".join([*parts[:n], ""]) for n in range(1, len(parts)))]
            for before in befores:
                if before not in numbers:
                    numbers[before] = format_of(place + before, beside)
            best = min(befores, key=lambda before: numbers[before])  # the shortest of them
            counts[numbers[best], place + best] += not name.endswith("num_batches_tracked")
    known = {key: n for key, n in counts.items() if key[0] < STATE_DICT}
    plain = {key: n for key, n in counts.items() if key[0] == STATE_DICT}
    for (number, place), n in (known or plain or counts).items():
        if _has_weights(places, place):
            yield HeldEncoder(place, number, n, None)


def _has_weights(places: Places, place: str) -> bool:
    """Whether some tensor there has the dimensions of a layer's weights: not so those of a queue's pointer alone."""
    named: Iterator[tuple[str, Tensor]] = ((at + name, x) for at, part in places.items() for name, x in part.items())
    return any(name.startswith(place) and x.ndim > 1 for name, x in named)
