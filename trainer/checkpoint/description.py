"""Reads and writes checkpoint.json, which describes a checkpoint and carries its own checksum."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from kilobatch.data.files import parse_json

DESCRIPTION = "checkpoint.json"  # in a checkpoint's folder: its contents, with a checksum


def is_checkpoint(path: Path) -> bool:
    """True for the folder of one checkpoint, whole or not."""
    return (path / DESCRIPTION).is_file() or (path.is_dir() and path.name.startswith("step-"))


def list_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints in a run's folder checkpoints/, whole or not, by step, oldest first."""
    found = {}
    for path in folder.glob("step-*"):
        if match := re.fullmatch(r"step-(\d+)", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def sealed(content: dict[str, Any]) -> bytes:
    """JSON that carries its own checksum; floats come back bit for bit (repr), also inf and nan."""
    return json.dumps({"sha256": _checksum(content), "content": content}, indent=1).encode()


def read_description(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's description. Raises OSError, and ValueError as unsealed does."""
    return unsealed((checkpoint / DESCRIPTION).read_bytes())


def unsealed(text: bytes) -> dict[str, Any]:
    """The content of JSON that sealed() made. Raises ValueError, which says what is wrong with it."""
    if not text.strip():
        raise ValueError("it is empty")
    try:
        whole = parse_json(text)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError alike
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(whole, dict) or whole.keys() != {"sha256", "content"} or not isinstance(whole["content"], dict):
        raise ValueError("it is not a checkpoint's description")
    if whole["sha256"] != _checksum(whole["content"]):
        raise ValueError("its checksum does not match its content")
    return whole["content"]


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
