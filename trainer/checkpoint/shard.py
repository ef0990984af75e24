"""One rank's part of a checkpoint: its slices of the tensors, copied into a reused buffer, as one safetensors file."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, Field, TypeAdapter
from torch import Tensor

from kilobatch.data.files import parse_json, write_synced

TINY = 1 << 16  # elements; rank 0 alone writes a replicated tensor that has fewer
TYPES = {  # safetensors' names of torch's own types, so that any safetensors reader opens a shard
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Piece:
    """A named tensor as this rank holds it.

    tensor: 1-D, elements [offset, offset + len) of the flattened whole tensor; shape: of the whole tensor.
    A piece that is a whole tensor is taken to be equal on every rank, and the ranks share the writing of it, unless it
    has one of these: own: the tensor differs by rank, and each rank saves its own; sharded: the slices of all ranks
    make up the whole tensor, as under ZeRO. A piece that is less than the whole tensor counts as sharded by itself; one
    that happens to be all of a small parameter needs the flag.
    """

    tensor: Tensor
    offset: int
    shape: tuple[int, ...]
    own: bool = False
    sharded: bool = False

    def __post_init__(self) -> None:
        assert self.tensor.dim() == 1, self.tensor.shape
        assert self.offset >= 0 and self.offset + len(self.tensor) <= math.prod(self.shape), (self.offset, self.shape)

    @classmethod
    def of(cls, tensor: Tensor, *, own: bool = False) -> "Piece":
        """A piece that is all of a tensor, which may have any shape and layout."""
        return cls(tensor.detach().reshape(-1), 0, tuple(tensor.shape), own)

    @property
    def replicated(self) -> bool:
        return not (self.own or self.sharded) and len(self.tensor) == math.prod(self.shape)


@dataclass(frozen=True)
class ShardEntry:
    """A piece as a shard's header describes it: elements [offset, offset + numel) of the whole tensor."""

    offset: int
    numel: int
    shape: tuple[int, ...]
    dtype: str
    own: bool


class _Stored(BaseModel):
    """What safetensors' header says of a tensor; other keys are left to its reader."""

    dtype: str
    shape: list[int] = Field(min_length=1, max_length=1)


_pieces = TypeAdapter(dict[str, tuple[int, list[int], bool]])  # as Snapshot.take describes them


def own_pieces(pieces: Mapping[str, Piece], rank: int, world: int) -> dict[str, Piece]:
    """The pieces that this rank writes: its own and sharded ones, and its share of each replicated one."""
    mine = {}
    for name, piece in pieces.items():
        if not piece.replicated:
            mine[name] = piece
        elif len(piece.tensor) < TINY:
            if rank == 0:
                mine[name] = piece
        else:
            start, end = (len(piece.tensor) * r // world for r in (rank, rank + 1))
            mine[name] = Piece(piece.tensor[start:end], start, piece.shape, sharded=True)
    return mine


class Snapshot:
    """A shard in memory, byte for byte as its safetensors file will hold it.

    The buffer is kept from save to save: fresh memory costs more in page faults than the copy itself. It is pinned
    when the tensors come from an accelerator.
    """

    def __init__(self) -> None:
        self.header = b""
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self.bytes = 0

    def take(self, pieces: Mapping[str, Piece]) -> None:
        """Copies the pieces. After it returns, training may change them."""
        # The widest types come first, so that every tensor is aligned to its own width.
        ordered = sorted(pieces.items(), key=lambda item: (-item[1].tensor.itemsize, item[0]))
        self.bytes = sum(piece.tensor.nbytes for _, piece in ordered)
        accelerated = any(piece.tensor.is_cuda for _, piece in ordered)
        if len(self.buffer) < self.bytes:
            self.buffer = torch.empty(self.bytes, dtype=torch.uint8, pin_memory=accelerated)
        header, start = {}, 0
        for name, piece in ordered:
            end = start + piece.tensor.nbytes
            self.buffer[start:end].view(piece.tensor.dtype).copy_(piece.tensor.detach(), non_blocking=True)
            header[name] = {
                "dtype": TYPES[piece.tensor.dtype],
                "shape": [len(piece.tensor)],
                "data_offsets": [start, end],
            }
            start = end
        described = {name: [piece.offset, piece.shape, piece.own] for name, piece in ordered}
        self.header = json.dumps({"__metadata__": {"pieces": json.dumps(described)}, **header}).encode()
        if accelerated:
            torch.cuda.synchronize()

    def write(self, path: Path) -> tuple[int, str]:
        """Writes and syncs the file; returns its size and SHA-256. Raises OSError.

        The safetensors library is not used for it: its errors carry no errno, and it makes either a second copy of the
        data or no checksum.
        """
        header = self.header + b" " * (-len(self.header) % 8)
        data = self.buffer[: self.bytes].numpy().data
        return write_synced(path, [len(header).to_bytes(8, "little"), header, data])


def read_entries(path: Path) -> dict[str, ShardEntry]:
    """The entries in a shard's header, by tensor name. Raises OSError or ValueError when the file is no shard."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is cut short")
        header = parse_json(file.read(length))
    try:
        pieces = _pieces.validate_json(header.pop("__metadata__")["pieces"], strict=True)
        return {name: _entry(_Stored.model_validate(stored), *pieces[name]) for name, stored in header.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"it is not that of a shard: {error!r}") from None


def _entry(stored: _Stored, offset: int, shape: list[int], own: bool) -> ShardEntry:
    return ShardEntry(offset, stored.shape[0], tuple(shape), stored.dtype, own)
