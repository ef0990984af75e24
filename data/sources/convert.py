"""Sources to .beton files: `convert` writes one, `verify` checks one, `prepare` finds or makes the one for a spec.

The writer is ours, in FFCV's layout: FFCV's own hangs when an image raises in one of its processes, and would want a
second pass over all images to find the broken ones. One pass, in order: the same images make the same bytes.
"""

import fcntl
import hashlib
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedRandom
from pathlib import Path

from kilobatch.data.beton import NOTE_FORMAT, Info, Writer, checksum, names_file, note_of, verify
from kilobatch.data.errors import Refusal
from kilobatch.data.files import sync_folder
from kilobatch.data.sources.image_files import LONGEST, BrokenImage, Stored
from kilobatch.data.sources.specs import Source, Split, open_source

PREPARED_SIDE = 512  # what `prepare` keeps of large photos: a 224-pixel crop at a scale of 0.2 still has 224 pixels
Sample = tuple[Stored, int] | BrokenImage
_TASK = 16  # images to one task of a thread


def convert(
    source: Source,
    out: Path,
    *,
    max_side: int | None = None,
    quality: int = 90,
    threads: int | None = None,
    skip_broken: bool = False,
    progress: bool = True,
) -> Info:
    """Writes `source` as FFCV's .beton with fields image and label, and beside it `out`.json and, where the images have
    names, `out`.names; replaces what was there.

    JPEG files of up to `max_side` pixels are kept byte for byte, other photos become JPEGs of `quality`, images of up
    to 64 pixels are stored as pixels. Broken images are left out with `skip_broken`; else, all of them found, refused.
    A killed conversion leaves `out`.partial, which the next one to the same place overwrites. Raises Refusal.
    """
    threads = len(os.sched_getaffinity(0)) if threads is None else threads
    beside = out, names_file(out), note_of(out)
    partial, partial_names, partial_note = (path.with_name(path.name + ".partial") for path in beside)
    try:
        _check(out, max_side, quality, threads)
        with _claimed(partial) as file:
            try:
                info, names = _write(source, file, out, max_side, quality, threads, skip_broken, progress)
                if info.names_sha256 is not None:
                    _write_synced(partial_names, names)
                _write_synced(partial_note, (info.model_dump_json(indent=1) + "\n").encode())
            except BaseException:
                for path in (partial, partial_names, partial_note):
                    path.unlink(missing_ok=True)
                raise
            # The note goes first and comes last: whenever this is killed, no note lies beside another file's bytes.
            note_of(out).unlink(missing_ok=True)
            sync_folder(out.parent)
            partial.replace(out)
            names_file(out).unlink(missing_ok=True)
            if info.names_sha256 is not None:
                partial_names.replace(names_file(out))
            partial_note.replace(note_of(out))
            sync_folder(out.parent)
    except OSError as error:
        raise Refusal(
            f"{out} cannot be written: {error.strerror}; nothing of it is left: name a place with room, that may be "
            "written to"
        ) from error
    return info


def _write(
    source: Source,
    file: BufferedRandom,
    out: Path,
    max_side: int | None,
    quality: int,
    threads: int,
    skip_broken: bool,
    progress: bool,
) -> tuple[Info, bytes]:
    """Fills the empty file and syncs it. Returns the note's content and that of the list of names."""
    writer = Writer(file, len(source))
    names, kept = source.names, bytearray()
    broken: list[str] = []
    with _shown(len(source), out, progress) as advance:
        for i, sample in enumerate(_all_stored(source, max_side, quality, threads)):
            if isinstance(sample, BrokenImage):
                broken.append(str(sample))
            elif skip_broken or not broken:  # after a broken one it will be refused, and only counts the others
                stored, label = sample
                writer.append(stored.mode, stored.width, stored.height, stored.data, label)
                if names:
                    kept += names[i].encode() + b"\n"
            advance()
    _judge(broken, len(source), skip_broken)
    table = writer.finish()
    os.fsync(file.fileno())
    info = Info(
        samples=writer.samples,
        classes=source.classes,
        bytes=file.seek(0, os.SEEK_END),
        sha256=checksum(file),
        alloc_table_ptr=table,
        max_side=max_side,
        quality=quality,
        skipped=broken,
        names_sha256=hashlib.sha256(kept).hexdigest() if names else None,
    )
    return info, bytes(kept)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def prepare(spec: str, split: Split) -> Path:
    """The .beton for data.train or data.test: the file itself, checked quickly, or the source, converted once.

    Conversions are kept in $KILOBATCH_CACHE (~/.cache/kilobatch), under a name made from everything that they depend
    on, and downscaled to 512 pixels. Any number of processes may ask at once: one converts, the others wait for it.
    Raises Refusal.
    """
    if spec.endswith(".beton"):
        path = Path(spec).expanduser()
        verify(path)
        return path
    source = open_source(spec, split)
    key = repr((NOTE_FORMAT, spec, split, PREPARED_SIDE, source.fingerprint()))
    if source.names:
        key += " with names"
    cache = Path(os.environ.get("KILOBATCH_CACHE") or Path.home() / ".cache" / "kilobatch").expanduser()
    out = cache / f"{spec.partition(':')[0]}-{split}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.beton"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = out.with_suffix(".lock").open("w")
    except OSError as error:
        raise Refusal(
            f"the cache {cache} cannot be written: {error.strerror}; set KILOBATCH_CACHE to another folder"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_whole(out):
            convert(source, out, max_side=PREPARED_SIDE)
    return out


def _is_whole(cached: Path) -> bool:
    """A damaged file of the cache can be made anew, unlike one that a user names."""
    try:
        verify(cached)
    except Refusal:
        return False
    return True


def _check(out: Path, max_side: int | None, quality: int, threads: int) -> None:
    if out.suffix != ".beton":
        raise Refusal(f"{out} does not end in .beton; write to {out.with_suffix('.beton')}")
    if out.is_dir():
        raise Refusal(f"{out} is a folder; give the name of a file to write")
    if not out.parent.is_dir():
        raise Refusal(f"{out} cannot be written: there is no folder {out.parent}; make it first")
    for name, value, highest in (
        ("max-side", max_side, LONGEST),
        ("quality", quality, 100),
        ("threads", threads, 1024),
    ):
        if value is not None and not 1 <= value <= highest:
            raise Refusal(f"--{name} is {value}; it must be from 1 to {highest}")


@contextmanager
def _claimed(partial: Path) -> Iterator[BufferedRandom]:
    """Opens the temporary file, empty, for this process alone; a dead process's claim ends with it."""
    with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(file.fileno()), partial.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:  # held, or renamed by its holder in the moment between opening and claiming
            raise Refusal(f"{partial} is being written by another conversion; wait for it, or write to another name")
        file.truncate()
        yield file


def _all_stored(source: Source, max_side: int | None, quality: int, threads: int) -> Iterator[Sample]:
    """All samples in order, a few tasks ahead of the one who asks, so that memory stays small."""

    def task(start: int) -> list[Sample]:
        done: list[Sample] = []
        for i in range(start, min(start + _TASK, len(source))):
            try:
                done.append(source.stored(i, max_side, quality))
            except BrokenImage as broken:
                done.append(broken)
        return done

    pool = ThreadPoolExecutor(threads)
    ahead: deque[Future[list[Sample]]] = deque()
    try:
        for start in range(0, len(source), _TASK):
            ahead.append(pool.submit(task, start))
            if len(ahead) > 2 * threads:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _judge(broken: list[str], images: int, skip_broken: bool) -> None:
    if len(broken) == images:
        raise Refusal(f"none of the {images:,} images can be read, the first being {broken[0]}; check the source")
    if broken and not skip_broken:
        shown = "".join(f"\n  {text}" for text in broken[:20])
        more = f"\n  and {len(broken) - 20:,} more" if len(broken) > 20 else ""
        raise Refusal(
            f"{len(broken):,} of {images:,} images are broken; mend or remove them, or leave them out with: "
            f"kilobatch convert --skip-broken{shown}{more}"
        )


@contextmanager
def _shown(total: int, out: Path, progress: bool) -> Iterator[Callable[[], object]]:
    """Yields what to call after each image: a bar on a terminal, elsewhere one line at the start."""
    if not progress or not sys.stderr.isatty():
        if progress:
            print(f"converting {total:,} images to {out}", file=sys.stderr, flush=True)
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(out.name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
