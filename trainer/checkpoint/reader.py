"""Reads checkpoints, on any number of ranks. Only whole ones can be opened."""

import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.data.files import sha256
from kilobatch.trainer.checkpoint.description import DESCRIPTION, list_checkpoints, read_description
from kilobatch.trainer.checkpoint.shard import TYPES, ShardEntry, read_entries


class Damaged(UserError):
    """A checkpoint is not whole. The message names the file and what is wrong with it."""


def newest(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in a folder that has all its checksums right; None where there is no checkpoint at all.

    report is called with a message for each damaged one, which is passed over. Raises UserError when all are damaged.
    Reads every byte of the checkpoint that it returns, so one rank should call it and send the path to the others,
    which then call open_saved(path, verify=False).
    """
    while found := list_checkpoints(folder):
        damages = []
        for path in reversed(found.values()):
            try:
                open_saved(path)
            except Damaged as damage:
                if path.exists():  # a run that is still going may have removed it, because it was too old
                    damages.append(str(damage))
                    report(f"{damage}; passed over")
                continue
            return path
        if len(damages) == len(found):
            listed = "".join(f"\n  {damage}" for damage in damages)
            raise UserError(f"no whole checkpoint in {folder}; start the run anew, or put a copy back:{listed}")
    return None


def open_saved(path: Path, *, verify: bool = True) -> "Saved":
    """Opens the checkpoint folder path.

    Sizes, headers and completeness are always checked; verify also checks every file's SHA-256.
    Raises Damaged where the checkpoint is not whole.
    """
    try:
        content = read_description(path)
        files: dict[str, dict[str, Any]] = content["files"]
        saved = Saved(path, content["step"], content["world"], content["meta"])
    except FileNotFoundError:
        raise Damaged(f"checkpoint {path}: {DESCRIPTION} is missing") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"checkpoint {path}: {DESCRIPTION} cannot be used: {error}") from None
    except KeyError as error:  # its checksum is right: another program has written it
        raise Damaged(f"checkpoint {path}: {DESCRIPTION} cannot be used: it has no {error}") from None
    if (named := re.search(r"step-(\d+)$", path.name)) and int(named[1]) != saved.step:
        raise Damaged(f"checkpoint {path}: {DESCRIPTION} is of step {saved.step}")
    for file in files:
        _check_size(path, file, files[file]["bytes"])
    if verify:
        with ThreadPoolExecutor(4) as pool:
            for file, found in zip(files, pool.map(lambda file: _sha256(path, file), files), strict=True):
                if found != files[file]["sha256"]:
                    raise Damaged(f"checkpoint {path}: the checksum of {file} does not match its content")
    for rank, file in enumerate(sorted(files)):
        try:
            entries = read_entries(path / file)
        except (OSError, ValueError) as error:
            problem = " ".join(str(error).split())[:200]
            raise Damaged(f"checkpoint {path}: the header of {file} cannot be used: {problem}") from None
        saved.add(rank, path / file, entries)
    saved.check_complete()
    return saved


def _check_size(path: Path, file: str, size: int) -> None:
    if not (path / file).exists():
        raise Damaged(f"checkpoint {path}: {file} is missing")
    if (found := (path / file).stat().st_size) != size:
        raise Damaged(f"checkpoint {path}: {file} has {found} bytes instead of {size}")


def _sha256(path: Path, file: str) -> str:
    try:
        return sha256(path / file)
    except OSError as error:
        raise Damaged(f"checkpoint {path}: {file} cannot be read: {error.strerror}") from None


class Saved:
    """A checkpoint on disk, opened by open_saved. Tensors are read when asked for, and only the slices asked for.

    folder: the checkpoint's own; step: its step; world: the number of ranks that wrote it; meta: as given to save().
    """

    def __init__(self, folder: Path, step: int, world: int, meta: dict[str, Any]) -> None:
        self.folder, self.step, self.world, self.meta = folder, step, world, meta
        self._entries: dict[str, list[tuple[ShardEntry, Path]]] = {}  # tensors that the ranks hold together
        self._own: dict[str, dict[int, tuple[ShardEntry, Path]]] = {}  # tensors that differ by rank
        self._files: dict[Path, Any] = {}  # open readers; safetensors declares no type for them

    def add(self, rank: int, file: Path, entries: dict[str, ShardEntry]) -> None:
        for name, entry in entries.items():
            if entry.own:
                self._own.setdefault(name, {})[rank] = entry, file
            else:
                self._entries.setdefault(name, []).append((entry, file))

    def check_complete(self) -> None:
        """Raises Damaged unless the slices of each tensor hold each of its elements once, in one type and shape."""
        for name, parts in self._entries.items():
            parts.sort(key=lambda part: (part[0].offset, part[0].numel))
            end = 0
            for entry, _ in parts:
                if entry.offset != end:
                    fault = "are missing" if entry.offset > end else "are stored twice"
                    between = sorted((end, entry.offset))
                    raise Damaged(f"checkpoint {self.folder}: elements {between[0]} to {between[1]} of {name} {fault}")
                end += entry.numel
            if end != (numel := math.prod(parts[0][0].shape)):
                raise Damaged(f"checkpoint {self.folder}: elements {end} to {numel} of {name} are missing")
            if len({(entry.dtype, entry.shape) for entry, _ in parts}) > 1 or name in self._own:
                raise Damaged(f"checkpoint {self.folder}: the ranks disagree on the type or shape of {name}")

    def names(self) -> list[str]:
        """The names of tensors that the ranks hold together, for read() and whole()."""
        return sorted(self._entries)

    def own_names(self) -> list[str]:
        """The names of tensors that differ by rank, for own()."""
        return sorted(self._own)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._parts(name)[0][0].shape

    def read(self, name: str, offset: int, numel: int) -> Tensor:
        """Elements [offset, offset + numel) of the flattened tensor, as a new tensor (numel,) on the CPU.

        Raises UserError when the checkpoint has no tensor of that name.
        """
        parts = self._parts(name)
        assert offset >= 0 and numel >= 0 and offset + numel <= math.prod(parts[0][0].shape), (name, offset, numel)
        out = torch.empty(numel, dtype=_TYPES[parts[0][0].dtype])
        for entry, file in parts:
            start, end = max(offset, entry.offset), min(offset + numel, entry.offset + entry.numel)
            if start < end:
                stored = self._file(file).get_slice(name)[start - entry.offset : end - entry.offset]
                out[start - offset : end - offset] = stored
        return out

    def whole(self, name: str) -> Tensor:
        shape = self.shape(name)
        return self.read(name, 0, math.prod(shape)).reshape(shape)

    def own(self, name: str, rank: int) -> Tensor:
        """The tensor of this rank (0 to world - 1) of the run that saved it. Raises UserError where it had none."""
        by_rank = self._own.get(name, {})
        if rank not in by_rank:
            raise UserError(
                f"checkpoint {self.folder}, written by {self.world} ranks, has no tensor '{name}' of rank {rank}"
                + ("" if by_rank else did_you_mean(name, self._own))
            )
        entry, file = by_rank[rank]
        return self._file(file).get_tensor(name).clone().reshape(entry.shape)

    def close(self) -> None:
        self._files.clear()

    def _parts(self, name: str) -> list[tuple[ShardEntry, Path]]:
        if name not in self._entries:
            raise UserError(f"checkpoint {self.folder} has no tensor '{name}'{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise UserError(
                    f"{self.folder} was removed while it was read, as a run that is trained keeps its newest "
                    "checkpoints only; give the command again"
                ) from None
        return self._files[path]


_TYPES = {name: dtype for dtype, name in TYPES.items()}
