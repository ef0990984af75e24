"""A pass over a source that fills the file of a .beton, from where a killed one has come to."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedRandom
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from kilobatch.data.beton import checksum
from kilobatch.data.beton_layout import ArrayForm
from kilobatch.data.beton_note import NOTE_FORMAT, BetonInfo
from kilobatch.data.beton_writer import Writer
from kilobatch.data.errors import UserError
from kilobatch.data.files import sha256, sync_folder
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import BrokenImage, EncodedImage
from kilobatch.data.sources.journal import ConversionProgress, Journal, JournalRecord
from kilobatch.data.sources.progress_bar import progress_bar
from kilobatch.data.sources.specs import Source

CONVERTER = 3  # its version, for the cache: conversions of one source by two versions differ
TASK_IMAGES = 16  # images in one task of a thread
EVERY = 5.0  # seconds between two records of the journal: so much work is done again after a kill
MOST_UNSYNCED = 1 << 28  # bytes, likewise: a slow disk would else take long to sync them
Sample = tuple[EncodedImage, int] | BrokenImage


@dataclass
class ConversionPass:
    """A conversion of a source into an open file. names: where the images' names are written; journal: an open one;
    asked: the encoding that was asked for, by which the journal is known."""

    source: Source
    file: BufferedRandom
    names: Path
    out: Path
    journal: Journal
    asked: Encoding
    threads: int
    skip_broken: bool
    progress: bool
    done: ConversionProgress = field(default_factory=ConversionProgress)

    def begin(self) -> Encoding:
        """Goes on where the journal says, or begins anew. Returns the encoding, with the range of deep pixels that was
        measured before a kill."""
        about, encoding = self.journal.about(), self.asked
        if about is not None and about.get("key") == self._key():
            if about["measured"] is not None:
                encoding = replace(encoding, value_range=tuple(about["measured"]), measured=True)
            if self._restore():
                return encoding
        self.restart(None)
        return self.asked

    def restart(self, measured: tuple[float, float] | None) -> None:
        """Begins anew. measured: the range of values of deep pixels."""
        self.file.truncate(0)
        self.writer, self.done = self._writer(), ConversionProgress()
        self.journal.restart({"key": self._key(), "measured": measured})
        sync_folder(self.out.parent)  # a power cut would else leave no file for what is synced below

    def run(self, encoding: Encoding) -> BetonInfo:
        """Encodes what is left, completes the file and syncs it. Returns its note. Raises UserError for broken images,
        and UnknownRangeError."""
        source, fields, names = self.source, self.source.fields, self.source.names
        done, writer = self.done, self.writer
        noted, since = replace(done, broken=[], warned=[]), time.monotonic()
        seen = len(done.broken), len(done.warned)
        with (
            self._open_names() as written_names,
            progress_bar(len(source), self.out, self.progress, done=done.images) as advance,
        ):
            for sample in encode_all(source, encoding, self.threads, done.images):
                i = done.images
                if isinstance(sample, BrokenImage):
                    done.broken.append(str(sample))
                elif self.skip_broken or not done.broken:  # else it is refused, after all broken images are found
                    image, label = sample
                    arrays = [np.asarray(array[i]) for array in fields.values()]
                    writer.append(image.mode, image.width, image.height, image.data, label, arrays)
                    done.deep |= image.deep
                    if image.warning is not None:
                        done.warned.append(image.warning)
                    if names is not None and written_names is not None:
                        done.names_end += written_names.write(names[i].encode() + b"\n")
                done.images, done.samples, done.position = i + 1, writer.samples, writer.position
                advance(1)
                if time.monotonic() - since > EVERY or done.position - noted.position > MOST_UNSYNCED:
                    self._note(noted.samples, seen, written_names)
                    noted, seen = replace(done, broken=[], warned=[]), (len(done.broken), len(done.warned))
                    since = time.monotonic()
        return self._finish(encoding)

    def _note(self, samples: int, seen: tuple[int, int], names: BinaryIO | None) -> None:
        """Syncs what is written, and notes it. samples, seen: how many samples, and messages of broken images and
        warnings, are noted already."""
        for file in (self.file, names):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        news = replace(self.done, broken=self.done.broken[seen[0] :], warned=self.done.warned[seen[1] :])
        self.journal.append(JournalRecord(news, self.writer.columns(samples)))

    def _finish(self, encoding: Encoding) -> BetonInfo:
        source, done = self.source, self.done
        _refuse_broken(done.broken, len(source), self.skip_broken)
        if done.broken:
            held = np.bincount(self.writer.labels() + 1, minlength=len(source.classes) + 1)[1:]
            if not held.all():
                raise UserError(
                    f"class '{source.classes[int(np.argmin(held))]}' has no images but broken ones; mend one, or "
                    "remove the class"
                )
        written = self.writer.finish()
        os.fsync(self.file.fileno())
        return BetonInfo(
            classes=source.classes,
            sha256=checksum(self.file),
            max_side=encoding.max_side,
            quality=encoding.quality,
            passed_over=dict(source.passed_over),
            skipped=done.broken,
            warned=done.warned,
            value_range=encoding.value_range if done.deep else None,
            names_sha256=sha256(self.names) if source.names is not None else None,
            **written,
        )

    @contextmanager
    def _open_names(self) -> Iterator[BinaryIO | None]:
        """The list of names, behind those of the samples that are written; None: the images have no names."""
        if self.source.names is None:
            self.names.unlink(missing_ok=True)
            yield None
            return
        with self.names.open("r+b" if self.names.exists() else "w+b") as file:
            file.seek(self.done.names_end)
            file.truncate()
            yield file

    def _restore(self) -> bool:
        """Takes over what the journal tells of. Returns whether it is all there, as it was written."""
        self.writer, self.done, done = self._writer(), ConversionProgress(), ConversionProgress()
        for record in self.journal.read():
            broken, warned = done.broken + record.progress.broken, done.warned + record.progress.warned
            done = replace(record.progress, broken=broken, warned=warned)
            self.writer.restore(record.parts, done.position)
        names = self.names.stat().st_size if self.names.exists() else 0
        size = os.fstat(self.file.fileno()).st_size
        if not done.samples or size < done.position or names < done.names_end or not self.writer.is_whole():
            return False
        self.file.truncate(done.position)
        self.file.seek(done.position)
        self.done = done
        return True

    def _writer(self) -> Writer:
        forms = [ArrayForm(name, array.dtype, array.shape[1:]) for name, array in self.source.fields.items()]
        return Writer(self.file, len(self.source), forms)

    def _key(self) -> str:
        """A hash of all that the bytes depend on."""
        source = self.source
        forms = [(name, array.dtype.str, array.shape) for name, array in source.fields.items()]
        of: tuple[Any, ...] = (NOTE_FORMAT, CONVERTER, self.asked, self.skip_broken, len(source), forms, source.classes)
        return hashlib.sha256(repr((*of, source.fingerprint())).encode(errors="surrogateescape")).hexdigest()


def encode_all(source: Source, encoding: Encoding, threads: int, first: int) -> Iterator[Sample]:
    """Encodes the samples from `first` on, in order; threads work only a few tasks ahead, so that memory stays
    small."""

    def task(start: int) -> list[Sample]:
        samples: list[Sample] = []
        for i in range(start, min(start + TASK_IMAGES, len(source))):
            try:
                samples.append(source.encode(i, encoding))
            except BrokenImage as broken:
                samples.append(broken)
        return samples

    pool = ThreadPoolExecutor(threads)
    ahead: deque[Future[list[Sample]]] = deque()
    try:
        for start in range(first, len(source), TASK_IMAGES):
            ahead.append(pool.submit(task, start))
            if len(ahead) > 2 * threads:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _refuse_broken(broken: list[str], images: int, skip_broken: bool) -> None:
    if len(broken) == images:
        raise UserError(f"none of the {images:,} images can be read, the first being {broken[0]}; check the source")
    if broken and not skip_broken:
        shown = "".join(f"\n  {text}" for text in broken[:20])
        more = f"\n  and {len(broken) - 20:,} more" if len(broken) > 20 else ""
        raise UserError(
            f"{len(broken):,} of {images:,} images are broken; mend or remove them, or leave them out with: "
            f"kilobatch convert --skip-broken{shown}{more}"
        )
