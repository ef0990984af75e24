"""`kilobatch embed`: the features of a source's images by a run's or an exported file's encoder, over workers.

Finished parts are kept in a hidden folder beside the output, so that the same command goes on where a killed one ended.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kilobatch.data.beton import read_labels, read_names, verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.files import discard, lock_file, refusing_os_errors, sync_folder
from kilobatch.data.sources.convert import prepare
from kilobatch.data.sources.encoding import encoding_for_views
from kilobatch.data.sources.path_names import printable
from kilobatch.data.sources.specs import Split
from kilobatch.data.views.groups import largest_side
from kilobatch.launch.cli.train import FINISHED, conclude
from kilobatch.launch.processes.output import say, tell
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.references import recipe_of
from kilobatch.trainer.checkpoint.feature_file import FeatureParts, check_feature_file, write_features
from kilobatch.trainer.checkpoint.feature_parts import EmbeddingWork


def embed(
    encoder: str, source: str, out: Path, *, split: Split, workers: int | None, force: bool, kept: bool = True
) -> int:
    """Writes the features of a source's images to `out`. Returns the exit code. Raises UserError before any worker is
    started.

    encoder: a run, one of its checkpoints, or an exported file; split: of sources that have two; kept: False: `out` is
    the caller's own, who reads and removes it, so that it is not spoken of.
    """
    out = out.expanduser()
    check_feature_file(out, force)
    recipe = recipe_of(encoder)
    work, step = _work_of(encoder, recipe, source, split, out if kept else Path("memory"))
    info = verify_beton(work.beton)
    names = [str(i) for i in range(info.samples)] if info.names_sha256 is None else read_names(work.beton)
    folder = parts_folder(out)
    with _locked(folder, out):
        work.discard_damaged(folder)
        if missing := work.missing(folder):
            code = _run_workers(folder, work, recipe, workers, len(missing))
            if code != FINISHED:
                tell("kilobatch: finished parts are kept; the same command goes on from them")
                return code
        width = work.read(folder, 0).shape[1]
        about = {"encoder": recipe.encoder.name, "method": recipe.method.name, "step": str(step)}
        about |= {"encoder_sha256": work.encoder_sha256, "images_sha256": work.images_sha256}
        table = FeatureParts(
            parts=lambda: (work.read(folder, part) for part in range(work.parts)),
            shape=(work.samples, width),
            names=names,
            labels=read_labels(work.beton),
            class_names=info.classes,
            about=about,
        )
        write_features(out, folder / f"whole{out.suffix}", table)
        discard(folder)
    classes = f"{len(info.classes):,} class{'es' if len(info.classes) != 1 else ''}"
    done = f"wrote {printable(str(out))}" if kept else "embedded"
    say(f"{done}: {work.samples:,} images, {width:,} features each, {classes}")
    say(f"{recipe.encoder.name} of {printable(encoder)}, step {step}")
    return FINISHED


def parts_folder(out: Path) -> Path:
    """The folder with the finished parts of an output that is not written yet."""
    return out.with_name(f".{out.name}.parts")


def _work_of(encoder: str, recipe: Recipe, source: str, split: Split, out: Path) -> tuple[EmbeddingWork, int]:
    """The work, and the step of the encoder. Verifies every byte of the encoder; converts a source, once."""
    from kilobatch.launch.worker.pretrained import resolve_reference

    found = resolve_reference(encoder)
    beton = prepare(source, split, encoding_for_views(largest_side(recipe.data.groups))).absolute()
    info = verify_beton(beton)
    if not info.samples:
        raise UserError(f"{source} has no images; name another source")
    work = EmbeddingWork(
        encoder=found.path,
        encoder_sha256=found.sha256,
        beton=beton,
        images_sha256=info.sha256,
        samples=info.samples,
        device="cpu" if recipe.run.device == "cpu" else "auto",  # a file from a machine with GPUs runs without
        stall_minutes=recipe.run.stall_minutes,
        out=out,
    )
    return work, found.step


def _run_workers(folder: Path, work: EmbeddingWork, recipe: Recipe, workers: int | None, missing: int) -> int:
    """Computes the missing parts. Returns the exit code."""
    from kilobatch.launch.processes.launcher import run_workers
    from kilobatch.launch.worker.devices import check_device, default_workers

    run = recipe.run.model_copy(update={"device": work.device})
    recipe = recipe.model_copy(update={"run": run})
    workers = workers or default_workers(recipe)
    check_device(recipe, workers)
    arguments = [str(folder.absolute()), work.model_dump_json()]
    module = "kilobatch.launch.worker.embedding"
    return conclude(folder, run_workers(folder, min(workers, missing), module, arguments, work.stall_minutes))


@contextmanager
def _locked(folder: Path, out: Path) -> Iterator[None]:
    """Makes the folder, and locks it, so that no two commands write one output. The kernel frees the lock when the
    process ends. File systems of some clusters have no locks."""
    with refusing_os_errors(folder):
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
        file = (folder / ".lock").open("w")
    with file:
        try:
            lock_file(file, wait=False)
        except BlockingIOError:
            raise UserError(f"{out} is being written by another command; wait for it, or choose another name") from None
        yield
