"""`kilobatch convert` and `export`: their arguments put together, their results in words."""

import sys
from pathlib import Path

from data import convert as conversion
from data.refusal import Refusal
from data.sources import Split, open_source


def convert(
    source: str | None, out: Path | None, *, split: Split, max_side: int | None, quality: int, skip_broken: bool
) -> None:
    """Writes `out`. Raises Refusal, as data.convert.convert does, and where an argument is missing."""
    if source is None or out is None:
        raise Refusal("convert needs a source and a file to write: kilobatch convert folder:photos/train train.beton")
    info = conversion.convert(
        open_source(source, split), out, max_side=max_side, quality=quality, skip_broken=skip_broken
    )
    print(f"wrote {out}: {_words(info)}")


def verify(file: Path, source: str | None, out: Path | None) -> None:
    """Reads every byte of a .beton. Raises Refusal where it is damaged."""
    if source is not None or out is not None:
        raise Refusal("convert --verify FILE checks one file; leave out the source and the file to write")
    print(f"{file} is whole: {_words(conversion.verify(file, full=True))}")


def export(run: str, out: Path, *, force: bool) -> None:
    """Writes the encoder of a run, or of one checkpoint's folder. Raises Refusal, as trainer.export.export does."""
    from launch import runs
    from trainer.export import export as export_encoder

    source = Path(run) if Path(run).is_dir() else runs.find(run)
    told = export_encoder(source, out, force=force, report=lambda line: print(line, file=sys.stderr))
    print(f"wrote {out}: {told['encoder']} of step {told['step']}, for {told['loads_into']}")


def _words(info: conversion.Info) -> str:
    skipped = f", {len(info.skipped):,} broken ones left out" if info.skipped else ""
    return f"{info.samples:,} images in {len(info.classes)} classes, {info.bytes:,} bytes{skipped}"
