"""`kilobatch convert`, `export` and `import`: their arguments put together, their results in words."""

import sys
from pathlib import Path

from kilobatch.data import beton
from kilobatch.data.errors import Refusal
from kilobatch.data.sources import convert as conversion
from kilobatch.data.sources.specs import Split, open_source


def convert(
    source: str | None, out: Path | None, *, split: Split, max_side: int | None, quality: int, skip_broken: bool
) -> None:
    """Writes `out`. Raises Refusal, as data.sources.convert.convert does, and where an argument is missing."""
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
    print(f"{file} is whole: {_words(beton.verify(file, full=True))}")


def export(run: str, out: Path, *, force: bool, whole: bool) -> None:
    """Writes the encoder of a run, or of one checkpoint's folder, or the whole method. Raises Refusal, as
    trainer.checkpoint.export.export does."""
    from kilobatch.launch.runs import run_folder as runs
    from kilobatch.trainer.checkpoint.export import export as export_encoder

    source = Path(run) if Path(run).is_dir() else runs.find(run)
    told = export_encoder(source, out, force=force, whole=whole, report=lambda line: print(line, file=sys.stderr))
    print(f"wrote {out}: {told['encoder']} of step {told['step']}, for {told['loads_into']}")


def import_tensorflow(
    checkpoint: Path, out: Path, *, classifier_after: int | None, projections: bool, force: bool
) -> None:
    """Writes a TensorFlow checkpoint as `export --whole` writes a run. Raises Refusal, as
    trainer.tf_import.variables.read does."""
    from kilobatch.launch.recipes import recipe
    from kilobatch.trainer.checkpoint import export as exporting
    from kilobatch.trainer.tf_import import variables as tensorflow_names
    from kilobatch.trainer.tf_import.bundle import Bundle, find

    exporting.check_out(out, force)
    bundle = Bundle(find(checkpoint))
    found = tensorflow_names.read(bundle, classifier_after, projections)
    classifies = found.method["name"] == "finetune"
    # The authors' images are numbers from 0 to 1 as they come: data_util.py, preprocess_image.
    views = {"mean": [0.0] * 3, "std": [1.0] * 3, "count": 1 if classifies else 2}
    views |= {"size": 32, "blur": None} if found.encoder["stem"] == "cifar" else {"size": 224}
    sections = {"data": {"views": views}, "method": found.method, "encoder": found.encoder}
    resolved = recipe.given(sections, str(checkpoint)).model_dump(mode="json")
    exporting.write(out, found.tensors, exporting.whole_metadata(resolved, 0, 0, found.classes))
    print(f"wrote {out}: {tensorflow_names.in_words(found)}")
    if found.left_out:
        print(f"left out: {', '.join(sorted(found.left_out)[:6])}{', …' if len(found.left_out) > 6 else ''}")
    given = " ".join(f"encoder.{name}={value}" for name, value in found.encoder.items())
    print(f"recipes that start from it want {given} data.views.mean=[0,0,0] data.views.std=[1,1,1]")


def _words(info: beton.Info) -> str:
    skipped = f", {len(info.skipped):,} broken ones left out" if info.skipped else ""
    return f"{info.samples:,} images in {len(info.classes)} classes, {info.bytes:,} bytes{skipped}"
