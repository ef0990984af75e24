"""Writes and reads files of features: .npz, .safetensors and, with pyarrow, .parquet. Loads no torch.

Features are written part by part, so that no process holds all of them. The same contents make the same bytes.
"""

import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from kilobatch.data.errors import UserError
from kilobatch.data.files import refusing_os_errors, sync_folder
from kilobatch.trainer.checkpoint.exported_file import LENGTH, METADATA

SUFFIXES = (".npz", ".parquet", ".safetensors")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the time in an .npz: the same contents make the same bytes


@dataclass(frozen=True)
class FeatureTable:
    """Features of images, in the order of their source.

    features: (N, D) float32; labels: (N,) int64, positions in class_names; names: of the images, paths within the
    folder that they come from, or else their numbers; about: what made them, such as the encoder and its step.
    """

    features: NDArray[np.float32]
    names: list[str]
    labels: NDArray[np.int64]
    class_names: list[str]
    about: dict[str, str]


@dataclass(frozen=True)
class FeatureParts:
    """A FeatureTable whose features are read part by part. parts: gives them, (n, D) each; shape: of all."""

    parts: Callable[[], Iterator[NDArray[np.float32]]]
    shape: tuple[int, int]
    names: list[str]
    labels: NDArray[np.int64]
    class_names: list[str]
    about: Mapping[str, str]


def check_feature_file(out: Path, force: bool) -> None:
    """Raises UserError unless out can be written as a new file of features."""
    if out.is_dir():
        raise UserError(f"{out} is a folder; name a file in it, such as {out / 'features.npz'}")
    if out.suffix not in SUFFIXES:
        raise UserError(f"{out} ends in '{out.suffix}'; features are written as {', '.join(SUFFIXES)}")
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"{out} would be a Parquet file, which pyarrow writes, and that is not installed; write {out.stem}.npz or "
            f"{out.stem}.safetensors, or pip install pyarrow"
        )
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} is no folder; make it first")
    if out.exists() and not force:
        raise UserError(f"{out} exists; choose another name, or replace it with --force")


def write_features(out: Path, temporary: Path, table: FeatureParts) -> None:
    """Writes the file, whole or not at all. temporary: a path on the same disk. Raises UserError where it cannot."""
    write = {".npz": _write_npz, ".parquet": _write_parquet, ".safetensors": _write_safetensors}[out.suffix]
    with refusing_os_errors(out):
        with temporary.open("wb") as file:
            write(file, table)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
        sync_folder(out.parent)


def read_features(path: str | os.PathLike[str]) -> FeatureTable:
    """Reads a file that `kilobatch embed` has written."""
    path = Path(path)
    if path.suffix == ".npz":
        with np.load(path) as file:
            names, classes = file["names"].tolist(), file["class_names"].tolist()
            return FeatureTable(file["features"], names, file["labels"], classes, json.loads(file["about"].item()))
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="numpy") as file:
            about = dict(file.metadata())
            names = file.get_tensor("names").tobytes().decode().split("\n")[:-1]
            features, labels = file.get_tensor("features"), file.get_tensor("labels")
        return FeatureTable(features, names, labels, json.loads(about.pop("class_names")), about)
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    read: Any = parquet.read_table(path)
    about = {key.decode(): value.decode() for key, value in read.schema.metadata.items() if key != b"ARROW:schema"}
    rows, width = read.num_rows, read.schema.field("features").type.list_size
    features = read["features"].combine_chunks().flatten().to_numpy().reshape(rows, width)
    classes = json.loads(about.pop("class_names"))
    return FeatureTable(features, read["names"].to_pylist(), read["labels"].to_numpy(), classes, about)


def _write_npz(file: BinaryIO, table: FeatureParts) -> None:
    """What np.load reads: features, names, labels, class_names and about, none of them pickled."""

    def add(name: str, array: NDArray[Any], parts: Iterator[NDArray[Any]]) -> None:
        """array: of this type; its shape is that of all parts."""
        header = {"descr": npy.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
        with archive.open(zipfile.ZipInfo(f"{name}.npy", EPOCH), "w", force_zip64=True) as member:
            npy.write_array_header_2_0(member, header)  # pyright: ignore[reportArgumentType]
            for part in parts:
                member.write(np.ascontiguousarray(part).data.cast("B") if part.size else b"")

    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        add("features", np.broadcast_to(np.float32(0), table.shape), table.parts())
        for name, values in (("names", table.names), ("class_names", table.class_names)):
            array = np.array(values, np.str_)
            add(name, array, iter([array.view(np.uint8)]))
        add("labels", table.labels, iter([table.labels]))
        about = np.array(json.dumps(table.about), np.str_)
        add("about", about, iter([about.reshape(1).view(np.uint8)]))


def _write_safetensors(file: BinaryIO, table: FeatureParts) -> None:
    """features and labels; names as UTF-8 bytes, a newline after each; about and class_names, as JSON, in the
    metadata."""
    names = "".join(f"{name}\n" for name in table.names).encode()
    header: dict[str, Any] = {METADATA: {**table.about, "class_names": json.dumps(table.class_names)}}
    start = 0
    sizes = {"features": ("F32", table.shape), "labels": ("I64", table.labels.shape), "names": ("U8", (len(names),))}
    for name, (kind, shape) in sizes.items():
        end = start + {"F32": 4, "I64": 8, "U8": 1}[kind] * int(np.prod(shape))
        header[name] = {"dtype": kind, "shape": [*shape], "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned
    file.write(len(text).to_bytes(LENGTH, "little") + text)
    for part in table.parts():
        file.write(part.astype("<f4").tobytes())
    file.write(table.labels.astype("<i8").tobytes() + names)


def _write_parquet(file: BinaryIO, table: FeatureParts) -> None:
    """Columns features, a list of D numbers, names and labels; about and class_names, as JSON, in the metadata."""
    import pyarrow  # pyright: ignore[reportMissingImports]
    from pyarrow import parquet  # pyright: ignore[reportMissingImports]

    schema: Any = pyarrow.schema(
        [
            ("features", pyarrow.list_(pyarrow.float32(), table.shape[1])),
            ("names", pyarrow.string()),
            ("labels", pyarrow.int64()),
        ],
        metadata={**table.about, "class_names": json.dumps(table.class_names)},
    )
    start = 0
    with parquet.ParquetWriter(file, schema) as writer:
        for part in table.parts():
            end = start + len(part)
            features = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(part.reshape(-1)), table.shape[1])
            columns = [features, pyarrow.array(table.names[start:end]), pyarrow.array(table.labels[start:end])]
            writer.write_table(pyarrow.table(columns, schema=schema))
            start = end
