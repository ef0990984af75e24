"""Saves and restores the state of every random generator, as tensors that a checkpoint holds by rank."""

import json
import random

import numpy as np
import torch
from torch import Tensor

from kilobatch.trainer.checkpoint.reader import Saved
from kilobatch.trainer.checkpoint.shard import Piece


def rng_pieces() -> dict[str, Piece]:
    """The global generators of torch (CPU, and this rank's accelerator), numpy and Python."""
    kind, numbers = "MT19937", np.random.get_state(legacy=False)  # noqa: NPY002 - libraries draw from the global one
    assert isinstance(numbers, dict) and numbers["bit_generator"] == kind, numbers
    key = {**numbers["state"], "key": numbers["state"]["key"].tolist()}
    states = {
        "rng.torch": torch.get_rng_state(),
        "rng.numpy": _from_text(json.dumps({**numbers, "state": key})),
        "rng.python": _from_text(json.dumps(random.getstate())),
    }
    if torch.cuda.is_available():
        states["rng.cuda"] = torch.cuda.get_rng_state()
    return {name: Piece.of(state, own=True) for name, state in states.items()}


def restore_rng(saved: Saved, rank: int) -> None:
    """Sets the generators to the state that this rank saved. Raises UserError where rank >= saved.world."""
    torch.set_rng_state(saved.own("rng.torch", rank))
    numbers = json.loads(_to_text(saved.own("rng.numpy", rank)))
    numbers["state"]["key"] = np.array(numbers["state"]["key"], dtype=np.uint32)
    np.random.set_state(numbers)  # noqa: NPY002
    version, internal, gauss = json.loads(_to_text(saved.own("rng.python", rank)))
    random.setstate((version, tuple(internal), gauss))
    if torch.cuda.is_available() and "rng.cuda" in saved.own_names():
        torch.cuda.set_rng_state(saved.own("rng.cuda", rank))


def random_state(device: torch.device) -> list[Tensor]:
    """The states of the torch generators that a forward on this device draws from, for set_random_state."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _to_text(stored: Tensor) -> str:
    return stored.numpy().tobytes().decode()
