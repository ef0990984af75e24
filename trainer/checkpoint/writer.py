"""Writes checkpoints: a step copies the tensors, a thread of each rank writes them, rank 0 renames the folder.

    checkpoints/step-00000123/rank-00000-of-00002.safetensors   this rank's share: slices of named tensors
                              checkpoint.json                   step, world, meta, size and SHA-256 of each file

A checkpoint is made in `.tmp-step-00000123`. Every rank writes and syncs its shard there and then a marker; rank 0
waits for all markers, writes the description, syncs and renames the folder. So `step-…` is whole or absent, whichever
rank is killed at whatever moment. The ranks communicate through these files alone: no collective runs in a thread
beside the training. Nothing is pickled.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from kilobatch.data.errors import UserError
from kilobatch.data.files import describe_os_error, discard, show_whole, sweep, sync_folder, write_synced
from kilobatch.trainer.checkpoint.description import DESCRIPTION, list_checkpoints, sealed
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import Damaged, open_saved
from kilobatch.trainer.checkpoint.shard import Piece, Snapshot, own_pieces
from kilobatch.trainer.checkpoint.soundness import recorded_soundness
from kilobatch.trainer.ranks.heartbeat import heartbeat


class Checkpoints:
    """The checkpoints of a run that is being trained. Every rank has one of these, for one folder that all ranks see.

    Construct it on every rank before the first collective of the training: rank 0 removes what a killed run left
    unfinished, and no rank may save before that. Raises UserError when the folder cannot be written to.

    A failed save does not stop the training at once: the next due_by_steps, due_by_clock, save or close raises its
    UserError, on every rank that can still see the folder.
    """

    def __init__(self, folder: Path, options: CheckpointOptions, rank: int, world: int) -> None:
        self.folder, self.options, self.rank, self.world = folder, options, rank, world
        self._snapshot = Snapshot()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._step = -1  # of the last save
        self._whole: set[int] = set()  # steps whose checkpoints rank 0 has found to be whole
        self._last_save = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                probe = folder / ".tmp-probe"
                probe.mkdir(exist_ok=True)
                for unfinished in folder.glob(".tmp-*"):
                    discard(unfinished)
                sweep(folder)
        except OSError as error:
            raise UserError(f"no checkpoint can be written in {folder}: {describe_os_error(error)}") from error

    def resumed(self, step: int) -> None:
        """Notes that the run was resumed from the checkpoint of this step, so that it is not saved again."""
        self._step = step

    def due_by_steps(self, step: int) -> bool:
        """True where the recipe asks for a checkpoint after `step` steps; the same on every rank."""
        self._raise_failure()
        return self.options.every_steps is not None and step % self.options.every_steps == 0

    def due_by_clock(self) -> bool:
        """True where the recipe's minutes have passed. Only on rank 0: the caller tells the other ranks."""
        self._raise_failure()
        minutes = self.options.every_minutes
        return self.rank == 0 and minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def save(self, step: int, pieces: Mapping[str, Piece], meta: dict[str, Any], wait: bool = False) -> None:
        """Makes the checkpoint of `step` steps; every rank calls it at the same step.

        Waits for an earlier save that is still being written, copies this rank's share, and returns while a thread
        writes it. wait: return only when the checkpoint is whole on disk. A second save of the same step only waits.
        meta: JSON (keys are strings), of which rank 0's is kept; floats come back bit for bit.
        """
        self._join()
        if step != self._step:
            self._step, self._last_save = step, time.monotonic()
            text = json.dumps(meta)  # at once, because the caller may change meta later
            self._snapshot.take(own_pieces(pieces, self.rank, self.world))
            self._writer = threading.Thread(
                target=self._write, args=(step, text), name=f"checkpoint {step}", daemon=True
            )
            self._writer.start()
        if wait:
            self._join()

    def close(self) -> None:
        """Waits for the writer and raises what it raised."""
        self._join()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.close()
        elif self._writer is not None:
            # The other ranks may be gone. So wait only a limited time for a checkpoint that is being written, and leave
            # the error that ends the run as it is.
            self._writer.join(timeout=min(60.0, 60 * self.options.timeout_minutes))

    def _join(self) -> None:
        if self._writer is not None:
            # Until its own limit has passed, a slow writer is no hang. One that stays longer is stuck in a write.
            until = time.monotonic() + 60 * self.options.timeout_minutes + 10
            while self._writer.is_alive() and time.monotonic() < until:
                heartbeat()
                self._writer.join(timeout=1.0)
            self._writer.join()
            self._writer = None
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # The methods below run in the writer thread.

    def _write(self, step: int, meta: str) -> None:
        try:
            self._write_parts(step, meta)
        except OSError as error:
            self._failure = self._refusal(step, f"{self.folder}: {describe_os_error(error)}")
            self._failure.__cause__ = error
        except Exception as error:  # raised again in the training thread
            self._failure = error
        if self._failure is not None:
            self._report_failure(step)

    def _write_parts(self, step: int, meta: str) -> None:
        unfinished, final = self.folder / f".tmp-step-{step:08d}", self.folder / f"step-{step:08d}"
        deadline = time.monotonic() + 60 * self.options.timeout_minutes
        unfinished.mkdir(exist_ok=True)
        file = _shard_name(self.rank, self.world)
        size, checksum = self._snapshot.write(unfinished / file)
        sync_folder(unfinished)  # before the marker, because rank 0 may rename the folder once it sees that
        marker = json.dumps({"bytes": size, "sha256": checksum})
        show_whole(unfinished / f"{file}.done", [marker.encode()])
        if self.rank == 0:
            files = {name: self._wait_for(unfinished, name, deadline) for name in _shard_names(self.world)}
            content = {"step": step, "world": self.world, "meta": json.loads(meta), "files": files}
            write_synced(unfinished / DESCRIPTION, [sealed(content)])
            for name in files:
                (unfinished / f"{name}.done").unlink()
            sync_folder(unfinished)
            open_saved(unfinished, verify=False)  # raises Damaged unless the pieces make whole tensors
            if final.exists():  # a damaged one, or one of a run that was resumed from an earlier checkpoint
                discard(final)
            unfinished.rename(final)
            sync_folder(self.folder)
            self._retain(step)
        else:
            self._wait_for_rename(unfinished, final, deadline)

    def _wait_for(self, unfinished: Path, name: str, deadline: float) -> dict[str, Any]:
        """Waits for one shard's marker and returns it. Raises UserError when its rank fails or is not done in time."""
        marker = unfinished / f"{name}.done"
        for _ in _until(deadline):
            self._raise_others_failure(unfinished)
            if marker.exists():
                return json.loads(marker.read_bytes())
        raise self._refusal(self._step, f"{name} was not written within {self.options.timeout_minutes:g} minutes")

    def _wait_for_rename(self, unfinished: Path, final: Path, deadline: float) -> None:
        """Waits until rank 0 has renamed the checkpoint's folder. Raises UserError when it does not in time."""
        for _ in _until(deadline + 10):  # seconds more, so that rank 0 is the first to name a rank that is late
            self._raise_others_failure(unfinished)
            if not unfinished.exists() and final.exists():
                return
        raise self._refusal(self._step, f"rank 0 did not finish it within {self.options.timeout_minutes:g} minutes")

    def _report_failure(self, step: int) -> None:
        """Writes a file that tells the waiting ranks of the failure.

        If the disk refuses it, they wait until their timeouts.
        """
        unfinished = self.folder / f".tmp-step-{step:08d}"
        with contextlib.suppress(OSError):
            if not any(unfinished.glob("rank-*.failed")):  # the first failure is the cause of the others
                show_whole(unfinished / f"rank-{self.rank:05d}.failed", [str(self._failure).encode()])

    def _raise_others_failure(self, unfinished: Path) -> None:
        try:
            failed = sorted(path for path in unfinished.iterdir() if path.suffix == ".failed")
        except FileNotFoundError:  # rank 0 has just renamed the folder
            return
        for path in failed:
            raise UserError(f"rank {int(path.stem[5:])}: {path.read_text()}")

    def _refusal(self, step: int, why: str) -> UserError:
        earlier = ", ".join(path.name for path in list_checkpoints(self.folder).values()) or "none"
        return UserError(
            f"the checkpoint of step {step} could not be written: {why}; earlier ones are whole: {earlier}"
        )

    def _retain(self, step: int) -> None:
        """Removes checkpoints that the options do not keep. Damaged ones and those of later steps are not counted.

        The newest one whose weights are finite and whose loss was in its range stays, too: while a training diverges,
        it is the one to go back to.
        """
        found = {old: path for old, path in list_checkpoints(self.folder).items() if old <= step}
        self._whole |= {old for old, path in found.items() if old not in self._whole and _looks_whole(path)}
        whole = [old for old in found if old in self._whole]
        last = whole[-self.options.keep_last :]
        kept = set(last)
        if every := self.options.keep_every_steps:
            kept |= {new for old, new in zip([0, *whole], whole, strict=False) if new // every > old // every}
        kept |= {*islice((old for old in reversed(whole) if _looks_sound(found[old])), 1)}
        for old, path in found.items():
            if old < last[0] and old not in kept:
                discard(path)
        sweep(self.folder)


def _shard_name(rank: int, world: int) -> str:
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def _shard_names(world: int) -> list[str]:
    return [_shard_name(rank, world) for rank in range(world)]


def _looks_whole(path: Path) -> bool:
    try:
        open_saved(path, verify=False)
    except Damaged:
        return False
    return True


def _looks_sound(path: Path) -> bool:
    try:
        meta = open_saved(path, verify=False).meta
    except Damaged:  # since it was found to be whole
        return False
    return recorded_soundness(meta).problem([]) is None


def _until(deadline: float) -> Iterator[None]:
    """Yields until the deadline, at first often, then once a second, because many ranks read from one disk."""
    pause = 0.01
    while time.monotonic() < deadline:
        yield
        time.sleep(pause)
        pause = min(1.0, 1.3 * pause)
