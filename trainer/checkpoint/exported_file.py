"""Seals an exported .safetensors file with a checksum of all that it holds, and checks it. Loads no torch.

safetensors itself has no checksum: a changed bit of a tensor gives another number, and no error.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

from kilobatch.data.errors import UserError
from kilobatch.data.files import CHUNK, parse_json, unreadable

KEY = "sha256"  # in the file's metadata: of the header without this key, as JSON with sorted keys, and of the tensors
METADATA = "__metadata__"  # safetensors' own name, in the header
LENGTH = 8  # bytes before the header, which say how long it is


def seal(content: bytes) -> list[bytes | memoryview]:
    """The parts of the file with this content, which has metadata, and with a checksum among them."""
    end = LENGTH + int.from_bytes(content[:LENGTH], "little")
    header, tensors = json.loads(content[LENGTH:end]), memoryview(content)[end:]
    sha = _begin(header)
    sha.update(tensors)
    header[METADATA][KEY] = sha.hexdigest()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    return [len(text).to_bytes(LENGTH, "little"), text, tensors]


def check_seal(file: Path) -> None:
    """Raises UserError where a file does not hold what was written. One without a checksum, which an earlier version or
    another program has written, is taken as it is. Reads every byte."""
    try:
        with file.open("rb") as opened:
            whole = _is_whole(opened)
    except OSError as error:
        raise UserError(unreadable(file, error)) from error
    if not whole:
        raise UserError(f"{file} is damaged: its checksum does not match its content; export or copy it again")


def _is_whole(opened: BinaryIO) -> bool:
    try:
        header = parse_json(opened.read(int.from_bytes(opened.read(LENGTH), "little")))
        recorded = header[METADATA].pop(KEY, None)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return False
    if recorded is None:
        return True
    sha = _begin(header)
    while chunk := opened.read(CHUNK):
        sha.update(chunk)
    return sha.hexdigest() == recorded


def _begin(header: dict[str, Any]) -> Any:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode())
