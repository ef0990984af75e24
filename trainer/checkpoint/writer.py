"""Writing checkpoints: copied in the step, written behind it by every rank, renamed as a whole by rank 0.

    checkpoints/step-00000123/rank-00000-of-00002.safetensors   this rank's share: slices of named tensors
                              checkpoint.json                   step, world, meta, size and SHA-256 of each file

A checkpoint is made in `.tmp-step-00000123`: every rank writes and syncs its shard there and then a marker; rank 0
waits for all markers, describes them, syncs and renames the folder. So `step-…` is whole or absent, whenever and
whoever is killed. Files are the ranks' only medium here: no collective runs in a thread beside training. No pickle.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kilobatch.data.errors import Refusal
from kilobatch.data.files import discard, in_words, show_whole, sweep, sync_folder, write_synced
from kilobatch.trainer.checkpoint.description import DESCRIPTION, sealed
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import Damaged, open_saved, steps
from kilobatch.trainer.checkpoint.shard import Piece, Snapshot, cut


class Checkpoints:
    """The checkpoints of a run that is being trained. Every rank has one, on one folder that all of them see.

    Construct it on every rank before the first collective of the training: rank 0 clears away what a killed run left
    unfinished, and no rank may save before that. Raises Refusal when the folder cannot be written to.

    A failed save stops nothing at once: the next due_by_steps, due_by_clock, save or close raises its Refusal, on every
    rank that can still see the folder.
    """

    def __init__(self, folder: Path, options: CheckpointOptions, rank: int, world: int) -> None:
        self.folder, self.options, self.rank, self.world = folder, options, rank, world
        self._snapshot = Snapshot()
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._step = -1  # of the last save
        self._whole: set[int] = set()  # steps whose checkpoints have been looked at, on rank 0
        self._clock = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if rank == 0:
                probe = folder / ".tmp-probe"
                probe.mkdir(exist_ok=True)
                for unfinished in folder.glob(".tmp-*"):
                    discard(unfinished)
                sweep(folder)
        except OSError as error:
            raise Refusal(f"no checkpoint can be written in {folder}: {in_words(error)}") from error

    def resumed(self, step: int) -> None:
        """The checkpoint of this step is there already: a save of it has nothing to do."""
        self._step = step

    def due_by_steps(self, step: int) -> bool:
        """Whether the recipe asks for a checkpoint after `step` steps; the same on every rank."""
        self._raise_failure()
        return self.options.every_steps is not None and step % self.options.every_steps == 0

    def due_by_clock(self) -> bool:
        """Whether minutes ask for one: rank 0's clock alone says so, and the caller tells the other ranks."""
        self._raise_failure()
        minutes = self.options.every_minutes
        return self.rank == 0 and minutes is not None and time.monotonic() - self._clock >= 60 * minutes

    def save(self, step: int, pieces: Mapping[str, Piece], meta: dict[str, Any], wait: bool = False) -> None:
        """Makes the checkpoint of `step` steps; every rank calls it at the same step.

        Copies this rank's share and returns, and a thread writes it; a save that is still being written is waited for
        first. wait: return when the checkpoint is whole on disk. A second save of the same step only waits.
        meta: JSON (keys are strings), rank 0's is kept; floats come back bit for bit.
        """
        self._join()
        if step != self._step:
            self._step, self._clock = step, time.monotonic()
            text = json.dumps(meta)  # now: the caller may change it
            self._snapshot.take(cut(pieces, self.rank, self.world))
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
            # the other ranks may be gone: give a checkpoint under way a while, and leave the error that ends the run
            self._writer.join(timeout=min(60.0, 60 * self.options.timeout_minutes))

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # What follows runs in the writer thread.

    def _write(self, step: int, meta: str) -> None:
        try:
            self._write_parts(step, meta)
        except OSError as error:
            self._failure = self._refusal(step, f"{self.folder}: {in_words(error)}")
            self._failure.__cause__ = error
        except Exception as error:  # raised again in the training thread
            self._failure = error
        if self._failure is not None:
            self._tell_failure(step)

    def _write_parts(self, step: int, meta: str) -> None:
        making, made = self.folder / f".tmp-step-{step:08d}", self.folder / f"step-{step:08d}"
        deadline = time.monotonic() + 60 * self.options.timeout_minutes
        making.mkdir(exist_ok=True)
        file = _shard_name(self.rank, self.world)
        size, checksum = self._snapshot.write(making / file)
        sync_folder(making)  # now: as soon as rank 0 sees the marker, the folder may be renamed
        marker = json.dumps({"bytes": size, "sha256": checksum})
        show_whole(making / f"{file}.done", [marker.encode()])
        if self.rank == 0:
            files = {name: self._wait_for(making, name, deadline) for name in _shard_names(self.world)}
            content = {"step": step, "world": self.world, "meta": json.loads(meta), "files": files}
            write_synced(making / DESCRIPTION, [sealed(content)])
            for name in files:
                (making / f"{name}.done").unlink()
            sync_folder(making)
            open_saved(making, verify=False)  # the pieces make whole tensors
            if made.exists():  # damaged, or of a run that went another way
                discard(made)
            making.rename(made)
            sync_folder(self.folder)
            self._retain(step)
        else:
            self._wait_for_rename(making, made, deadline)

    def _wait_for(self, making: Path, name: str, deadline: float) -> dict[str, Any]:
        """The marker of one shard. Raises Refusal when its rank failed, or is not done in time."""
        marker = making / f"{name}.done"
        for _ in _until(deadline):
            self._raise_others_failure(making)
            if marker.exists():
                return json.loads(marker.read_bytes())
        raise self._refusal(self._step, f"{name} was not written within {self.options.timeout_minutes:g} minutes")

    def _wait_for_rename(self, making: Path, made: Path, deadline: float) -> None:
        """Returns when rank 0 has made the checkpoint whole. Raises Refusal when it has not in time."""
        for _ in _until(deadline + 10):  # rank 0 has the first word on a rank that is late
            self._raise_others_failure(making)
            if not making.exists() and made.exists():
                return
        raise self._refusal(self._step, f"rank 0 did not finish it within {self.options.timeout_minutes:g} minutes")

    def _tell_failure(self, step: int) -> None:
        """Tells the other ranks, who wait, if the disk allows; else their waits run out."""
        making = self.folder / f".tmp-step-{step:08d}"
        with contextlib.suppress(OSError):
            if not any(making.glob("rank-*.failed")):  # the first failure is the cause of the others
                show_whole(making / f"rank-{self.rank:05d}.failed", [str(self._failure).encode()])

    def _raise_others_failure(self, making: Path) -> None:
        try:
            failed = sorted(path for path in making.iterdir() if path.suffix == ".failed")
        except FileNotFoundError:  # rank 0 has renamed it since the caller looked
            return
        for path in failed:
            raise Refusal(f"rank {int(path.stem[5:])}: {path.read_text()}")

    def _refusal(self, step: int, why: str) -> Refusal:
        earlier = ", ".join(path.name for path in steps(self.folder).values()) or "none"
        return Refusal(f"the checkpoint of step {step} could not be written: {why}; earlier ones are whole: {earlier}")

    def _retain(self, step: int) -> None:
        """Removes what the options do not keep. A damaged checkpoint is not counted, nor one of a later step."""
        found = {old: path for old, path in steps(self.folder).items() if old <= step}
        self._whole |= {old for old, path in found.items() if old not in self._whole and _looks_whole(path)}
        whole = [old for old in found if old in self._whole]
        last = whole[-self.options.keep_last :]
        kept = set(last)
        if every := self.options.keep_every_steps:
            kept |= {new for old, new in zip([0, *whole], whole, strict=False) if new // every > old // every}
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


def _until(deadline: float) -> Iterator[None]:
    """Yields until the deadline, at first often, then once a second: many ranks ask one disk."""
    pause = 0.01
    while time.monotonic() < deadline:
        yield
        time.sleep(pause)
        pause = min(1.0, 1.3 * pause)
