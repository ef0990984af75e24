"""`kilobatch convert`, `export` and `import`: checks their arguments and prints their results."""

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kilobatch.data import beton
from kilobatch.data.beton_note import note_path
from kilobatch.data.errors import UserError, warn
from kilobatch.data.sources.arguments import check_arguments
from kilobatch.data.sources.convert import convert as convert_source
from kilobatch.data.sources.convert import describe
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.hold_out import held_out_path, parse_share, split_source
from kilobatch.data.sources.path_names import printable
from kilobatch.data.sources.specs import Source, Split, open_source


def convert_or_check(
    source: str | None,
    out: Path | None,
    verify: Path | None,
    adopt: Path | None,
    *,
    class_names: Path | None,
    label_field: str | None,
    **options: Any,
) -> None:
    """Writes `out`; or, where a file is given, verifies or adopts that one. options: as convert takes them. Raises
    UserError where these exclude each other, and as the functions below."""
    refuse_contradictions(adopt, verify, {"--class-names": class_names, "--label-field": label_field})
    if adopt is not None:
        adopt_file(adopt, source, out, class_names, label_field)
    elif verify is not None:
        verify_file(verify, source, out)
    else:
        convert(source, out, **options)


def convert(
    source: str | None,
    out: Path | None,
    *,
    split: Split,
    max_side: int | None,
    min_side: int | None,
    quality: int,
    value_range: str | None,
    skip_broken: bool,
    hold_out: str | None = None,
    hold_out_seed: int = 0,
) -> None:
    """Writes `out` and, with a share to hold out, a second file. Raises UserError where an argument is missing, and as
    data.sources.convert.convert does."""
    if source is None or out is None:
        raise UserError("convert needs a source and a file to write: kilobatch convert folder:photos/train train.beton")
    encoding = Encoding(max_side, min_side, quality, None if value_range is None else _read_range(value_range))
    share = None if hold_out is None else parse_share(hold_out)
    opened: Source = open_source(source, split)
    held: Source | None = None
    if share is not None:
        check_arguments(out, encoding, 1)  # before all images may be read
        opened, held = split_source(opened, share, hold_out_seed)
    info = convert_source(opened, out, encoding=encoding, skip_broken=skip_broken)
    print(f"wrote {printable(str(out))}: {describe(info)}")
    if held is not None:
        if info.value_range is not None:  # pixels of more than 8 bits have to mean the same in both
            encoding = replace(encoding, value_range=info.value_range, measured=value_range is None)
        second = held_out_path(out)
        info = convert_source(held, second, encoding=encoding, skip_broken=skip_broken)
        print(f"wrote {printable(str(second))}: {describe(info)}")
    if value_range is not None and info.value_range is None:
        warn(f"--range {value_range} changed nothing: no image has more than 8 bits a channel")


def _read_range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(number) for number in text.split(","))
    except ValueError:
        low = high = math.nan
    if not -math.inf < low < high < math.inf:
        raise UserError(f"--range is '{text}'; give the values that become 0 and 255, as in --range 0,4095")
    return low, high


def verify_file(file: Path, source: str | None, out: Path | None) -> None:
    """Reads every byte of a .beton. Raises UserError where it is damaged."""
    if source is not None or out is not None:
        raise UserError("convert --verify FILE checks one file; leave out the source and the file to write")
    print(f"{printable(str(file))} is whole: {describe(beton.verify_beton(file, full=True))}")


def adopt_file(file: Path, source: str | None, out: Path | None, classes: Path | None, label: str | None) -> None:
    """Checks a .beton that FFCV or an older kilobatch wrote, and writes its note. Raises UserError as adopt does."""
    if source is not None or out is not None:
        raise UserError("convert --adopt FILE checks one file; leave out the source and the file to write")
    beton.read_header(file)  # before numba is imported, which makes a folder for its cache
    from kilobatch.data.sources.adopt import adopt

    info = adopt(file, classes=classes, label=label)
    print(f"adopted {printable(str(file))}, wrote {printable(note_path(file).name)}: {describe(info)}")


def refuse_contradictions(adopt: Path | None, verify: Path | None, options: Mapping[str, object]) -> None:
    """Raises UserError for --adopt together with --verify, and for an option that only --adopt uses without it."""
    if adopt is not None and verify is not None:
        raise UserError(f"--adopt checks every byte of a file, as --verify does; leave out --verify {verify}")
    for name, value in options.items():
        if value is not None and adopt is None:
            raise UserError(f"{name} is {value}; it belongs to --adopt: kilobatch convert --adopt FILE {name} …")


def export(run: str, out: Path, *, force: bool, whole: bool) -> None:
    """Writes the encoder or, with `whole`, the whole method. run: a run, or the folder of one of its checkpoints.
    Raises UserError, as trainer.checkpoint.export.export does."""
    from kilobatch.launch.runs import run_folder
    from kilobatch.trainer.checkpoint.description import is_checkpoint
    from kilobatch.trainer.checkpoint.export import export as export_encoder

    path = Path(run).expanduser()
    source = path if is_checkpoint(path) else run_folder.find_run(run)  # by a name alone, as all commands find a run
    metadata = export_encoder(source, out, force=force, whole=whole, report=lambda line: print(line, file=sys.stderr))
    print(f"wrote {out}: {metadata['encoder']} of step {metadata['step']}, for {metadata['loads_into']}")
    print(f"it takes images prepared so: {metadata['preprocess']}")
    print(f"in Python: network, preprocess = kilobatch.load_encoder({str(out)!r})")


def import_tensorflow(
    checkpoint: Path, out: Path, *, classifier_after: int | None, projections: bool, force: bool
) -> None:
    """Writes a TensorFlow checkpoint to a file like that of `export --whole`. Raises UserError, as
    trainer.tf_import.variables.read_variables does."""
    from kilobatch.launch.recipes.recipe import recipe_from
    from kilobatch.trainer.checkpoint.export import check_out, whole_metadata, write
    from kilobatch.trainer.tf_import.bundle import Bundle, find_checkpoint
    from kilobatch.trainer.tf_import.variables import describe_imported, read_variables

    check_out(out, force)
    bundle = Bundle(find_checkpoint(checkpoint))
    imported = read_variables(bundle, classifier_after, projections)
    classifies = imported.method["name"] == "finetune"
    # The authors do not normalise: their images are numbers from 0 to 1 (data_util.py, preprocess_image).
    views = {"mean": [0.0] * 3, "std": [1.0] * 3, "count": 1 if classifies else 2}
    views |= {"size": 32, "blur": None} if imported.encoder["stem"] == "cifar" else {"size": 224}
    sections = {"data": {"views": views}, "method": imported.method, "encoder": imported.encoder}
    resolved = recipe_from(sections, str(checkpoint)).model_dump(mode="json")
    write(out, imported.tensors, whole_metadata(resolved, 0, 0, imported.classes))
    print(f"wrote {out}: {describe_imported(imported)}")
    if imported.left_out:
        print(f"left out: {', '.join(sorted(imported.left_out)[:6])}{', …' if len(imported.left_out) > 6 else ''}")
    encoder = " ".join(f"encoder.{name}={value}" for name, value in imported.encoder.items())
    print(f"recipes that start from it want {encoder} data.views.mean=[0,0,0] data.views.std=[1,1,1]")
