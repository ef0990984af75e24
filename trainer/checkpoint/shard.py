"""One rank's part of a checkpoint: which bytes it writes, copied out of training into one reused buffer."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kilobatch.data.files import write_synced

TINY = 1 << 16  # elements; a smaller replicated tensor is rank 0's alone
TYPES = {  # safetensors' names; torch's own types only, so that any safetensors reader opens a shard
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

    tensor: 1-D, elements [offset, offset + len) of the flattened whole; shape: of the whole.
    A whole tensor is taken to be equal on every rank, and the ranks share the writing of it. own: it differs by rank,
    and each saves its own. sharded: the ranks' slices together make the whole, as under ZeRO; a slice that is less
    than the whole is sharded by nature, one that happens to be all of a small parameter must say so.
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
        """All of a tensor, of any shape and layout."""
        return cls(tensor.detach().reshape(-1), 0, tuple(tensor.shape), own)

    @property
    def replicated(self) -> bool:
        return not (self.own or self.sharded) and len(self.tensor) == math.prod(self.shape)


@dataclass(frozen=True)
class Entry:
    """Where a stored piece stands: elements [offset, offset + numel) of the whole tensor."""

    offset: int
    numel: int
    shape: tuple[int, ...]
    dtype: str
    own: bool


def cut(pieces: Mapping[str, Piece], rank: int, world: int) -> dict[str, Piece]:
    """What this rank writes: own and sharded pieces as they are, and its share of each replicated one."""
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
        """Copies the pieces; when it returns, training may change them."""
        # the widest types first: then every tensor is aligned to its own width
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
        places = {name: [piece.offset, piece.shape, piece.own] for name, piece in ordered}
        self.header = json.dumps({"__metadata__": {"pieces": json.dumps(places)}, **header}).encode()
        if accelerated:
            torch.cuda.synchronize()

    def write(self, path: Path) -> tuple[int, str]:
        """Writes and syncs the file; returns its size and SHA-256. Raises OSError.

        Written here and not by the safetensors library, which gives no errno, holds a second copy or no checksum.
        """
        header = self.header + b" " * (-len(self.header) % 8)
        data = self.buffer[: self.bytes].numpy().data
        return write_synced(path, [len(header).to_bytes(8, "little"), header, data])


def read_entries(path: Path) -> dict[str, Entry]:
    """The directory of a shard. Raises OSError or ValueError when it is not one."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is cut short")
        header = json.loads(file.read(length))
    places = json.loads(header.pop("__metadata__")["pieces"])
    return {
        name: Entry(places[name][0], stored["shape"][0], tuple(places[name][1]), stored["dtype"], places[name][2])
        for name, stored in header.items()
    }
