"""Converts sources to .beton files: `convert` writes one, `prepare` finds or makes the one for a recipe's source.

FFCV's own writer is not used: it hangs when an image raises an error in one of its processes, and would need a second
pass over all images to find the broken ones. Here there is one pass, in order: the same images make the same bytes.
"""

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from io import BufferedRandom
from pathlib import Path

from kilobatch.data.beton import verify_beton
from kilobatch.data.beton_note import NOTE_FORMAT, BetonInfo, names_path, note_path, note_text
from kilobatch.data.errors import UserError
from kilobatch.data.files import cache_root, sync_folder, write_synced
from kilobatch.data.sources.arguments import check_arguments, partial_files
from kilobatch.data.sources.conversion_pass import CONVERTER, ConversionPass
from kilobatch.data.sources.deep_pixels import UnknownRangeError, range_of_bits
from kilobatch.data.sources.encoding import Encoding, encoding_for_views
from kilobatch.data.sources.image_files import listening_to_pillow
from kilobatch.data.sources.journal import journal_path, open_journal
from kilobatch.data.sources.path_names import printable
from kilobatch.data.sources.specs import Source, Split, is_beton, open_source, scheme_of
from kilobatch.data.sources.walk import describe_passed_over

AS_IS = Encoding()


def convert(
    source: Source,
    out: Path,
    *,
    encoding: Encoding = AS_IS,
    threads: int | None = None,
    skip_broken: bool = False,
    progress: bool = True,
) -> BetonInfo:
    """Writes `source` as FFCV's .beton with fields image, label and those of the source, and `out`.json beside it and,
    where the images have names, `out`.names; replaces older files.

    JPEG files that are small enough are kept byte for byte, other photos become JPEGs, images of up to 64 pixels are
    stored as pixels. For images of more than 8 bits the range of values is measured over all of them, unless `encoding`
    has it. Broken images are left out with `skip_broken`; else all are found, and the
    conversion is refused. A killed conversion leaves `out`.partial and its journal, `out`.tmp: the next one of the same
    images to the same place goes on from there, and makes the same bytes. Raises UserError.
    """
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    try:
        check_arguments(out, encoding, threads)
        partial, partial_names, partial_note = partial_files(out)
        with _open_alone(partial) as file, listening_to_pillow(), closing(open_journal(out)) as journal:
            try:
                work = ConversionPass(
                    source, file, partial_names, out, journal, encoding, threads, skip_broken, progress
                )
                encoding = work.begin()
                try:
                    info = work.run(encoding)
                except UnknownRangeError:  # the first image of more than 8 bits was met: now all are looked at
                    measured = _measure_range(source, threads, progress)
                    work.restart(measured)
                    info = work.run(replace(encoding, value_range=measured, measured=True))
                write_synced(partial_note, [note_text(info)])
            except KeyboardInterrupt:
                raise  # what is written is kept, as after a kill
            except BaseException:
                for path in (partial, partial_names, partial_note, journal_path(out)):
                    path.unlink(missing_ok=True)
                raise
            # The note is removed first and written last, so that a kill at any moment leaves no note beside a file that
            # it does not describe.
            note_path(out).unlink(missing_ok=True)
            sync_folder(out.parent)
            partial.replace(out)
            names_path(out).unlink(missing_ok=True)
            if info.names_sha256 is not None:
                partial_names.replace(names_path(out))
            partial_note.replace(note_path(out))
            journal_path(out).unlink()
            sync_folder(out.parent)
    except OSError as error:
        raise UserError(
            f"{printable(str(out))} cannot be written: {error.strerror}; nothing of it is left: name a place with "
            "room, that may be written to"
        ) from error
    return info


def describe(info: BetonInfo) -> str:
    """What a conversion took, left out and passed over, in one line: the counts add up to the files found."""
    classes = f"in {len(info.classes):,} {'class' if len(info.classes) == 1 else 'classes'}"
    if not info.classes:
        classes = "without labels"
    fields = "".join(f", {field.name} {list(field.shape)} of {field.dtype}" for field in info.fields)
    text = f"{info.samples:,} images {classes}{fields}, {info.bytes:,} bytes"
    others = sum(info.passed_over.values())
    if info.skipped or others:
        left = [f"{len(info.skipped):,} broken ones left out"] if info.skipped else []
        left += [f"{others:,} passed over: {describe_passed_over(info.passed_over)}"] if others else []
        text += f"; of {info.samples + len(info.skipped) + others:,} files {', '.join(left)}"
    if info.value_range is not None:
        low, high = info.value_range
        text += f"; values from {low:,g} to {high:,g} of images with more than 8 bits became 0 to 255"
    if info.warned:
        text += f"; {len(info.warned):,} with warnings, such as {info.warned[0]}"
    return text


def prepare(spec: str, split: Split, encoding: Encoding | None = None) -> Path:
    """The .beton for data.train or data.test: that file itself, after the quick check, or the source, converted once.

    Conversions are kept in $KILOBATCH_CACHE (~/.cache/kilobatch), under a name made from everything that they depend
    on. Any number of processes may call this at once: one converts, the others wait. encoding: by default what views of
    224 pixels need. Raises UserError.
    """
    if is_beton(spec):
        path = Path(spec).expanduser()
        verify_beton(path)
        return path
    encoding = encoding or encoding_for_views(224)
    source = open_source(spec, split)
    out, cache = _in_cache(source, spec, encoding), cache_root()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = out.with_suffix(".lock").open("w")
    except OSError as error:
        raise UserError(
            f"the cache {cache} cannot be written: {error.strerror}; set KILOBATCH_CACHE to another folder"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(out):
            print(f"converted {spec}: {describe(convert(source, out, encoding=encoding))}", file=sys.stderr, flush=True)
    return out


def kept_conversion(spec: str, split: Split, encoding: Encoding) -> Path | None:
    """The .beton that `prepare` has made of a source; None: it has not. Raises UserError where the source is not
    here."""
    out = _in_cache(open_source(spec, split), spec, encoding)
    return out if out.is_file() and _is_whole(out) else None


def _in_cache(source: Source, spec: str, encoding: Encoding) -> Path:
    """The same file however a source is named: by a relative path, as a split of its folder, or by that split's own."""
    scheme = scheme_of(spec)
    key = repr((NOTE_FORMAT, CONVERTER, scheme, encoding, source.fingerprint()))
    return cache_root() / f"{scheme}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.beton"


def _is_whole(cached: Path) -> bool:
    """Whether a file of the cache passes the quick check; a damaged one is made anew, unlike one that a user names."""
    try:
        verify_beton(cached)
    except UserError:
        return False
    return True


def _measure_range(source: Source, threads: int, progress: bool) -> tuple[float, float]:
    """The range of values that becomes 0 to 255 in images of more than 8 bits: of as many bits as all of them use."""
    with ThreadPoolExecutor(threads) as pool:
        values = [found for found in pool.map(source.deep_values, range(len(source))) if found is not None]
    low, high = min((low for low, _ in values), default=0), max((high for _, high in values), default=65_535)
    taken = range_of_bits(low, high)
    if progress:
        print(
            f"{len(values):,} images have more than 8 bits a channel, with values from {low:,g} to {high:,g}: from "
            f"{taken[0]:,g} to {taken[1]:,g} they become 0 to 255 (another range: kilobatch convert --range LOW,HIGH)",
            file=sys.stderr,
            flush=True,
        )
    return taken


@contextmanager
def _open_alone(partial: Path) -> Iterator[BufferedRandom]:
    """Opens the temporary file, locked for this process; a process that dies gives up its lock."""
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = os.path.samestat(os.fstat(file.fileno()), partial.stat())
        except (BlockingIOError, FileNotFoundError):
            locked = False
        if not locked:  # another process has the lock, or renamed the file between our opening and locking it
            raise UserError(f"{partial} is being written by another conversion; wait for it, or write to another name")
        yield file
