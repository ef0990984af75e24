"""Source hf:FOLDER: a data set that Hugging Face's `datasets` has saved by save_to_disk."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.data.files import parse_json
from kilobatch.data.sources.arrow_tables import TableImages, require_pyarrow
from kilobatch.data.sources.open_cache import opened_once
from kilobatch.data.sources.splits import Split, split_folders

SPLITS, STATE = "dataset_dict.json", "state.json"


class SavedDataset(TableImages):
    """Images of Arrow's files, which are mapped into memory: no image is read before it is encoded."""

    def __init__(self, where: str, files: list[Path], options: Mapping[str, str]) -> None:
        self._tables: list[Any] = []
        self._first = np.zeros(0, np.int64)  # the first image of each file, and behind them the number of images
        super().__init__(where, files, options, None)

    def _schema(self) -> Any:
        self._tables = [_mapped(file) for file in self.files]
        self._first = np.cumsum([0, *(len(table) for table in self._tables)])
        return self._tables[0].schema

    def _read_columns(self) -> Iterator[tuple[Path, Iterable[str | None], Any | None]]:
        image, label = self.columns.image, self.columns.label
        for file, table in zip(self.files, self._tables, strict=True):
            labels = None if label is None else table.column(label).combine_chunks()
            if not self.columns.paths:
                yield file, [None] * len(table), labels
                continue
            chunks = table.column(image).chunks
            yield file, (path for chunk in chunks for path in chunk.field("path").to_pylist()), labels

    def _cell(self, i: int) -> Any:
        file = int(np.searchsorted(self._first, i, side="right")) - 1
        return self._tables[file].column(self.columns.image)[i - int(self._first[file])].as_py()


def open_hf(folder: Path, split: Split, options: Mapping[str, str]) -> SavedDataset:
    """hf:FOLDER. Of a folder of several splits, that of the option `split` or, without, the one that is named after the
    training's or the test's. Raises UserError."""
    where = f"hf:{folder}"
    part = split_of_saved(folder, split, options.get("split"))
    state = _read(where, part / STATE)
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(
            f"{where}: {part} chooses rows of other files; save it again by flatten_indices().save_to_disk()"
        )
    try:
        files = [part / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError):
        files = []
    if not files:
        raise UserError(f"{where}: {part / STATE} names no file; save the data set again")
    require_pyarrow(where)
    return opened_once(
        SavedDataset, files, lambda: SavedDataset(f"hf:{part}", files, options), *sorted(options.items())
    )


def split_of_saved(folder: Path, split: Split, asked: str | None) -> Path:
    """The folder of a split of a saved data set. Raises UserError where there is none."""
    where = f"hf:{folder}"
    if (folder / STATE).is_file():
        if asked is not None:
            raise UserError(f"{where} is one split; leave out split={asked}, or give the folder above it")
        return folder
    if not (folder / SPLITS).is_file():
        what = "there is no such folder" if not folder.is_dir() else f"it has neither {SPLITS} nor {STATE}"
        raise UserError(
            f"{where}: {what}; give a folder that save_to_disk() wrote (for Parquet files: parquet:FOLDER/*.parquet)"
        )
    names = _read(where, folder / SPLITS).get("splits")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: {SPLITS} names no splits; save the data set again")
    if asked is not None:
        if asked not in names:
            raise UserError(f"{where} has no split '{asked}'{did_you_mean(asked, names)}")
        return folder / asked
    found = [name for name, its in split_folders(names).items() if its == split]
    if len(found) == 1:
        return folder / found[0]
    kind = "training" if split == "train" else "test"
    ways = " or ".join(f"{where}?split={name}" for name in found or names)
    raise UserError(f"{where} has {len(found) or 'no'} splits of {kind} images; name one: {ways}")


def _read(where: str, file: Path) -> Mapping[str, Any]:
    try:
        content = parse_json(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {file} cannot be read: {error}; save the data set again") from None
    return content if isinstance(content, dict) else {}


def _mapped(file: Path) -> Any:
    """Arrow's table in a file, in either of its two forms."""
    import pyarrow

    memory = pyarrow.memory_map(str(file))
    if file.stat().st_size >= 6 and memory.read(6) == b"ARROW1":
        return pyarrow.ipc.open_file(memory).read_all()
    memory.seek(0)
    return pyarrow.ipc.open_stream(memory).read_all()
