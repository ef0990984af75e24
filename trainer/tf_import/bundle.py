"""Reads TensorFlow's checkpoints without TensorFlow: NAME.index and NAME.data-00000-of-0000N, its "V2" format.

The index is a table of protocol buffers: BundleHeaderProto under the empty key, a BundleEntryProto for each tensor
(tensorflow/core/protobuf/tensor_bundle.proto, tensorflow/core/util/tensor_bundle).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.trainer.tf_import.crc32c import masked_crc32c
from kilobatch.trainer.tf_import.table import read_table, varint

DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64, 19: np.float16}  # DataType of types.proto
Fields = dict[int, list[Any]]  # a message's values by field number: numbers as int, all others as bytes


@dataclass(frozen=True)
class BundleEntry:
    """A tensor of a checkpoint: `size` bytes at `offset` of a data file.

    shard: the data file's number; dtype: TensorFlow's number of the type; sliced: the tensor is stored in parts.
    """

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    sliced: bool


class Bundle:
    """An open checkpoint. entries: its tensors by name."""

    def __init__(self, prefix: Path) -> None:
        """prefix: the path without .index. Raises UserError where files are absent, damaged or of another format."""
        self.prefix = prefix
        self._index = prefix.with_name(prefix.name + ".index")
        try:
            table = read_table(self._index.read_bytes())
            header = _fields(table.pop(b""))
            self.entries = {key.decode(): _entry(value) for key, value in table.items()}
        except OSError as error:
            raise UserError(f"{self._index} cannot be read: {error.strerror}") from error
        except KeyError:
            raise UserError(f"{self._index} is no index of a TensorFlow checkpoint: it has no header") from None
        except (ValueError, IndexError, TypeError) as error:
            raise UserError(f"{self._index} is no whole index of a TensorFlow checkpoint: {error}") from error
        if _number(header, 2):
            raise UserError(f"{self._index} is of a big-endian machine, whose numbers are not read")
        self.shards = _number(header, 1)
        missing = [path.name for path in map(self._shard, range(self.shards)) if not path.is_file()]
        if missing:
            raise UserError(f"{missing[0]} is missing in {prefix.parent}: the checkpoint has {self.shards} data files")

    def read(self, name: str) -> NDArray[Any]:
        """A tensor, in its own type. Raises UserError where its bytes are missing or do not match their checksum."""
        if name not in self.entries:
            raise UserError(f"checkpoint {self.prefix} has no variable '{name}'{did_you_mean(name, self.entries)}")
        entry = self.entries[name]
        if entry.dtype not in DTYPES or entry.sliced:
            what = "is cut into slices" if entry.sliced else f"is of TensorFlow's type {entry.dtype}"
            raise UserError(f"variable '{name}' of checkpoint {self.prefix} {what}, which is not read")
        dtype, path = np.dtype(DTYPES[entry.dtype]), self._shard(entry.shard)
        expected = math.prod(entry.shape) * dtype.itemsize
        with path.open("rb") as file:
            file.seek(entry.offset)
            data = file.read(entry.size)
        if len(data) != entry.size or len(data) != expected:
            raise UserError(
                f"{path}: variable '{name}' has {len(data)} bytes there instead of {expected}; copy it anew"
            )
        if masked_crc32c(data) != entry.crc:
            raise UserError(f"{path}: the checksum of variable '{name}' does not match its bytes; copy it anew")
        return np.frombuffer(data, dtype).reshape(entry.shape)

    def _shard(self, number: int) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}.data-{number:05}-of-{self.shards:05}")


def find_checkpoint(path: Path) -> Path:
    """The prefix of the checkpoint that path names.

    path: the prefix itself, one of the checkpoint's files, or its folder, also a SavedModel's. In a folder with several
    checkpoints the file `checkpoint` says which is the newest. Raises UserError.
    """
    if path.is_dir():
        folder = path / "variables" if (path / "saved_model.pb").is_file() else path
        if (state := folder / "checkpoint").is_file():
            named = re.search(r'^model_checkpoint_path: "(.+)"', state.read_text("utf-8", "replace"), re.MULTILINE)
            if named and (found := folder / Path(named[1]).name).with_name(f"{found.name}.index").is_file():
                return found
        names = sorted(file.name.removesuffix(".index") for file in folder.glob("*.index"))
        if len(names) == 1:
            return folder / names[0]
        if names:
            raise UserError(f"{path} holds {len(names)} checkpoints; name one of them: {', '.join(names[:4])}")
        raise UserError(f"{path} holds no TensorFlow checkpoint: no file there ends in .index")
    prefix = path.with_name(re.sub(r"\.(index|data-\d{5}-of-\d{5}|meta)$", "", path.name))
    if prefix.with_name(prefix.name + ".index").is_file():
        return prefix
    if prefix.is_file():
        raise UserError(
            f"{path} is one file; a TensorFlow checkpoint has an index beside its data, {prefix.name}.index"
        )
    raise UserError(f"there is no TensorFlow checkpoint {prefix}: {prefix.name}.index is missing")


def _entry(message: bytes) -> BundleEntry:
    fields = _fields(message)
    shape = _fields(fields.get(2, [b""])[0])
    return BundleEntry(
        dtype=_number(fields, 1),
        shape=tuple(_number(_fields(dim), 1) for dim in shape.get(2, [])),
        shard=_number(fields, 3),
        offset=_number(fields, 4),
        size=_number(fields, 5),
        crc=_number(fields, 6),
        sliced=7 in fields,
    )


def _number(fields: Fields, field: int) -> int:
    value = fields.get(field, [0])[-1]
    if not isinstance(value, int):
        raise ValueError("a number in it is none")
    return value


def _fields(message: bytes) -> Fields:
    """The fields of a protocol buffer, each with its values in order. Raises ValueError where it is damaged."""
    fields: Fields = {}
    at = 0
    while at < len(message):
        tag, at = varint(message, at)
        value: int | bytes
        match tag & 7:
            case 0:
                value, at = varint(message, at)
            case 1 | 5 as wire:
                size = 8 if wire == 1 else 4
                value, at = int.from_bytes(message[at : at + size], "little"), at + size
            case 2:
                size, at = varint(message, at)
                value, at = message[at : at + size], at + size
            case wire:
                raise ValueError(f"a message in it has a field of kind {wire}")
        fields.setdefault(tag >> 3, []).append(value)
    if at != len(message):
        raise ValueError("a message in it is cut off")
    return fields
