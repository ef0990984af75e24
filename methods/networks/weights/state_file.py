"""Reads the tensors of a file that any package has written, without running code that the file may hold."""

import argparse
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kilobatch.data.errors import UserError

DEPTH = 6  # of mappings inside each other; VISSL's trunk is the fourth
# Optimizers hold a tensor for each parameter, too, but of its moments.
PASSED_OVER = ("optimizer", "optimizers", "optimizer_states", "lr_schedulers", "scaler")
# The arguments of DINO and others lie beside the weights in a Namespace, which only holds values.
HARMLESS: list[Any] = [argparse.Namespace]

Places = dict[str, dict[str, Tensor]]  # tensors by name, by the keys that lead to them, each with a slash at its end


def read_places(file: Path) -> tuple[Places, list[str]]:
    """All mappings of names to tensors in a file of torch.save or safetensors, and the keys at its top.

    Raises UserError where it is no such file, is damaged, holds other objects than tensors and plain values, or holds
    no tensor.
    """
    content = _read_safetensors(file) if is_safetensors(file) else _read_pickle(file)
    places = places_of(content)
    if not places:
        kind = f"keys {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{file} holds no named tensors ({kind}); name a file with a network's state dict")
    return places, [str(key) for key in content]


def places_of(content: Any) -> Places:
    """All mappings of names to tensors in a file's content; none where it is no mapping."""
    return {place: tensors for place, tensors in _places(content, "", DEPTH) if tensors}


def is_safetensors(file: Path) -> bool:
    """Whether a file is one of safetensors: eight bytes that say how long its header is, and JSON."""
    with file.open("rb") as opened:
        return opened.read(9)[8:] == b"{"


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole .safetensors file ({error}); copy it again") from None


def _read_pickle(file: Path) -> Any:
    with file.open("rb") as opened:
        zipped = opened.read(2) == b"PK"
    try:
        with torch.serialization.safe_globals(HARMLESS):
            # Mapped, what is not copied (an optimizer's state) is not read. Files from before torch 1.6 cannot be.
            return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise UserError(_needs_code(file, zipped, error)) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError, TypeError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"{file} is no whole file of weights ({why}); name a .safetensors file, or one of torch.save, or copy it "
            "again"
        ) from None


def _needs_code(file: Path, zipped: bool, error: Exception) -> str:
    """The message for a file with objects whose classes would have to be imported and called."""
    names: list[str] = []
    if zipped:
        names = sorted({*torch.serialization.get_unsafe_globals_in_checkpoint(file)} - {"argparse.Namespace"})
    if not names:
        text = str(error)
        if "Unsupported global: GLOBAL " not in text:
            return f"{file} is no file of torch.save or safetensors, or it is damaged; copy it again, or name another"
        names = [text.partition("Unsupported global: GLOBAL ")[2].split()[0]]
    return (
        f"{file} holds objects of {', '.join(names[:5])} beside tensors, and to load these could run code; where you "
        'trust it, write its weights alone, with the packages that made it: python -c "import torch; x = torch.load('
        f"'{file}', map_location='cpu', weights_only=False); x = x.state_dict() if hasattr(x, 'state_dict') else "
        "x.get('state_dict', x.get('model', x)); torch.save(x, 'weights.pth')\""
    )


def _places(content: Any, place: str, depth: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if not isinstance(content, dict) or not depth:
        return
    yield place, {str(name): x for name, x in content.items() if isinstance(x, Tensor)}
    for name, inner in content.items():
        if name not in PASSED_OVER:
            yield from _places(inner, f"{place}{name}/", depth - 1)
