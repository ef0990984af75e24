"""Changes of a run since it began: its data and recipe now, compared with its identity.json. Loads no torch."""

import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kilobatch.data.beton import verify_beton
from kilobatch.data.errors import UserError, warn
from kilobatch.data.sources.specs import Split, absolute_spec, differing_classes
from kilobatch.launch.recipes.data import PreparedData, PreparedFile, data_sha256, labelled_of, used_of
from kilobatch.launch.recipes.outside import source_files
from kilobatch.launch.recipes.outside.source_files import FILE_OF
from kilobatch.launch.recipes.recipe import Recipe, recipe_from
from kilobatch.launch.recipes.references import newest_description
from kilobatch.launch.recipes.settings import format_value
from kilobatch.launch.runs import identity, job_history
from kilobatch.launch.runs.identity import AcceptedChanges, Change, Identity, ImagesIdentity
from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.evaluate.options import CLASSIFYING

PACKAGES = ("kilobatch", "torch", "deepspeed", "ffcv")
# Of these options the content counts, which has a SHA-256, and not the path.
_BY_CONTENT = ("data.train", "data.test", "data.labels.list")
# These say where a run's folder was made, which changes nothing in its training.
OF_FOLDER = ("run.name", "run.folder")
# Options that decide on what a checkpoint holds, and what an evaluation asks.
_SHAPING = ("encoder.name", "encoder.stem", "encoder.width", "encoder.sk_ratio", "method.name", "optimizer.name")
_OF_NETWORK = ("encoder.", "method.", "data.views")
_ABSENT = object()


def identity_of(recipe: Recipe, data: PreparedData, step: int) -> Identity:
    """What a run is now, at a step of its training."""
    return Identity(
        recorded=job_history.utc_now(),
        step=step,
        train=_images(data.train),
        data_sha256=data_sha256(recipe, data),
        test=None if data.test is None else _images(data.test),
        recipe=recipe.model_dump(mode="json"),
        versions=versions(),
        sources=source_files.hashes(recipe),
    )


def versions() -> dict[str, str]:
    """The versions that a run depends on, as they are now."""
    return {**{name: version(name) for name in PACKAGES}, "python": platform.python_version()}


def _images(file: PreparedFile) -> ImagesIdentity:
    info = verify_beton(file.beton)
    return ImagesIdentity(sha256=file.sha256, samples=info.samples, classes=info.classes)


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint, from which a resume goes on; 0: there is none."""
    described = newest_description(run).get("step")  # one that is damaged is passed over, as training does
    return max(list_checkpoints(run / "checkpoints"), default=0) if described is None else described


def recipe_changes(run: Path, recipe: Recipe) -> list[Change]:
    """What differs between the recipe that a run began with and this one; none where it has not begun.

    For a run without identity.json, which an earlier version began, the recipe in its newest checkpoint counts.
    """
    try:
        before = recorded_recipe(run)
    except UserError as error:  # an option has another form in this version
        return [Change(name="recipe", old=str(error), new="valid")]
    if before is None:
        return []
    old, new = before.model_dump(mode="json"), recipe.model_dump(mode="json")
    by_content = {*_BY_CONTENT, *source_files.same_names(before, recipe)}
    found = [change for change in _differences(old, new, "") if change.name not in (*by_content, *OF_FOLDER)]
    recorded = identity.read_identity(run)
    contents = source_files.content_changes(recorded.sources if recorded else {}, recipe)
    return [*found, *contents]


def recorded_recipe(run: Path) -> Recipe | None:
    """The recipe that a run has been trained with so far; None where it has not begun. Raises UserError where an option
    has another form in this version."""
    recorded = identity.read_identity(run)
    values = recorded.recipe if recorded else newest_description(run).get("recipe")
    return None if values is None else recipe_from(values, f"the recipe that {run} began with")


def changes_of(run: Path, recipe: Recipe, data: PreparedData) -> list[Change]:
    """What differs between a run as it began and as it is now: its recipe, as recipe_changes has it, and its data."""
    return [*recipe_changes(run, recipe), *_data_changes(run, recipe, data)]


def _data_changes(run: Path, recipe: Recipe, data: PreparedData) -> Iterator[Change]:
    now = identity_of(recipe, data, 0)
    before = recorded_data(run, now)
    yield from _image_changes("data.train", before.train, now.train)
    if before.train.sha256 == now.train.sha256 and before.data_sha256 != now.data_sha256:
        yield _sha256_change("labelled images of data.train", before.data_sha256, now.data_sha256)
    yield from _image_changes("data.test", before.test, now.test)


def recorded_data(run: Path, now: Identity) -> Identity:
    """The identity whose train, data_sha256 and test a run began with, as far as it is known: from identity.json, else
    from the newest checkpoint; as now where nothing is known."""
    if recorded := identity.read_identity(run):
        return recorded
    meta = newest_description(run)
    trained = {"sha256": meta.get("images_sha256", now.train.sha256), "classes": meta.get("class_names")}
    labelled = meta.get("data_sha256", now.data_sha256)
    return now.model_copy(update={"train": now.train.model_copy(update=trained), "data_sha256": labelled})


def recorded_extent(run: Path) -> tuple[int, int] | None:
    """How many training images and classes a run began with; None where that is not known."""
    if recorded := identity.read_identity(run):
        return None if recorded.train.classes is None else (recorded.train.samples, len(recorded.train.classes))
    meta = newest_description(run)
    return (meta["images"], meta["classes"]) if {"images", "classes"} <= meta.keys() else None


def _image_changes(name: str, old: ImagesIdentity | None, new: ImagesIdentity | None) -> Iterator[Change]:
    if old is None or new is None:
        if old is not new:
            yield Change(name=name, old=_describe(old), new=_describe(new))
        return
    if old.sha256 != new.sha256:
        yield _sha256_change(f"images of {name}", old.sha256, new.sha256)
    if (
        old.classes is not None
        and new.classes is not None
        and (differing := differing_classes(old.classes, new.classes))
    ):
        yield Change(name=f"classes of {name}", old=differing[0], new=differing[1])


def _describe(images: ImagesIdentity | None) -> str:
    return "none" if images is None else f"{images.samples:,} images of SHA-256 {images.sha256[:12]}…"


def _sha256_change(name: str, old: str, new: str) -> Change:
    return Change(name=name, old=f"SHA-256 {old[:12]}…", new=f"{new[:12]}…")


def _differences(old: Any, new: Any, key: str) -> Iterator[Change]:
    if isinstance(old, list) and isinstance(new, list) and all(isinstance(part, dict) for part in (*old, *new)):
        old, new = ({str(number): part for number, part in enumerate(parts)} for parts in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            inner = f"{key}.{name}" if key else name
            yield from _differences(old.get(name, _ABSENT), new.get(name, _ABSENT), inner)
    elif old != new:
        before, now = ("absent" if value is _ABSENT else format_value(value) for value in (old, new))
        yield Change(name=key, old=before, new=now)


def refuse_changes(run: Path, changes: list[Change], command: str = "") -> None:
    """Raises UserError, which lists the changes, where there are any. command: by which they are meant; "": resume."""
    if not changes:
        return
    listed = "".join(f"\n  {change}" for change in changes)
    command = command or f"kilobatch resume {run} --accept-changes"
    raise UserError(
        f"{run} has changed since it began:{listed}\nput back what it was (recipe.yaml, images), or, if all of this is "
        f"meant from step {newest_step(run)} on: {command}"
    )


def refuse_other_images(
    run: Path, recipe: Recipe, data: PreparedData, named: Mapping[str, str | None], evaluators: Sequence[str]
) -> None:
    """Raises UserError where a run is to be evaluated on other images than it saw, and these were not named.

    named: the images that the user has named, by split; None: those of the recipe are meant. It is refused as well
    where the recipe's network or views have changed: the run is evaluated as it was trained.
    """
    if found := [
        change for change in recipe_changes(run, recipe) if change.name.removeprefix(FILE_OF).startswith(_OF_NETWORK)
    ]:
        listed = "; ".join(map(str, found))
        raise UserError(f"{run / 'recipe.yaml'} has changed since the run began: {listed}; put the old values back")
    now = identity_of(recipe, data, 0)
    before = recorded_data(run, now)
    if named["train"] is None:
        _refuse_unnamed(run, recipe, "train", list(_image_changes("data.train", before.train, now.train)))
        early = identity.read_identity(run) is None and "images_sha256" not in newest_description(run)
        if early and before.data_sha256 != now.data_sha256:
            change = _sha256_change("images or labels of data.train", before.data_sha256, now.data_sha256)
            _refuse_unnamed(run, recipe, "train", [change])
    elif asked := [name for name in evaluators if name in CLASSIFYING]:
        differing = differing_classes(before.train.classes or now.train.classes or [], now.train.classes or [])
        if differing:
            raise UserError(
                f"--train '{named['train']}' has other classes than {run} was trained on: {differing[0]} there is "
                f"{differing[1]} here, and {asked[0]} asks its classifier; leave --train out, or ask for knn"
            )
    if named["test"] is None:
        _refuse_unnamed(run, recipe, "test", list(_image_changes("data.test", before.test, now.test)))


def _refuse_unnamed(run: Path, recipe: Recipe, split: Split, changes: list[Change]) -> None:
    if not changes:
        return
    spec = str(recipe.data.train if split == "train" else recipe.data.test)
    start = "" if absolute_spec(spec) == spec else ", or evaluate in the folder that the run was started in"
    raise UserError(
        f"data.{split} '{spec}' is not what {run} saw: {'; '.join(map(str, changes))}; put the old ones back{start}, "
        f"or, where these are meant, name them: --{split} {shlex.quote(spec)}"
    )


def record_accepted(run: Path, recipe: Recipe, data: PreparedData, changes: list[Change]) -> None:
    """Writes changes that a user has accepted into identity.json, with the step from which they count; prints them.

    Raises UserError where the newest checkpoint cannot go on with them.
    """
    step = newest_step(run)
    refuse_other_shapes(run, recipe, data, changes)
    before = identity.read_identity(run) or _record_late(run, recipe, data, step)
    now = identity_of(recipe, data, before.step)
    entry = AcceptedChanges(
        step=step,
        time=job_history.utc_now(),
        data_sha256=recorded_data(run, now).data_sha256,
        changes=changes,
    )
    kept = {
        "recorded": before.recorded,
        "references": before.references,
        "accepted": [*before.accepted, entry],
        "branched_from": before.branched_from,
    }
    identity.write_identity(run, now.model_copy(update=kept))
    print(f"changed from step {step} on:" + "".join(f"\n  {change}" for change in changes), flush=True)


def refuse_other_shapes(run: Path, recipe: Recipe, data: PreparedData, changes: list[Change]) -> None:
    """Raises UserError, before anything is written, for what is known to fit no checkpoint of this run."""
    if not newest_step(run):
        return
    if found := [change for change in changes if change.name in _SHAPING or _begins_to_scale(change)]:
        listed = "; ".join(map(str, found))
        raise UserError(f"no checkpoint of {run} can go on with {listed}; put the old value back, or start a new run")
    used = used_of(recipe, data)
    if recipe.data.unlabelled == "drop" and (labelled := labelled_of(recipe, data)) is not None:
        used = labelled
    images = verify_beton(data.train.beton).samples if used is None else len(used)
    steps, before = images // recipe.data.batch, newest_description(run).get("steps_per_epoch")
    if before not in (None, steps):
        raise UserError(
            f"the epochs of {run} have {before} steps, and would now have {steps}, so that no checkpoint says where it "
            "would go on; keep data.batch and the number of images, or start a new run"
        )


def _begins_to_scale(change: Change) -> bool:
    """Whether a run would go on in fp16, whose loss scale its checkpoints do not hold."""
    return (change.name, change.new) == ("engine.precision", "fp16")


def begin_or_compare(run: Path, recipe: Recipe, data: PreparedData) -> frozenset[str]:
    """Records what a run is where its training begins; where it goes on, compares. Called by one process of the run.

    Returns the SHA-256 of the data before changes that were accepted. Raises UserError for changes that were not; other
    versions of the packages are a warning.
    """
    recorded, step = identity.read_identity(run), newest_step(run)
    refuse_changes(run, changes_of(run, recipe, data))
    if recorded is None and step:
        recorded = _record_late(run, recipe, data, step)
    elif recorded is None:
        recorded = identity_of(recipe, data, 0)
    else:
        _warn_of_versions(run, recorded.versions, versions())
        return frozenset(entry.data_sha256 for entry in recorded.accepted)
    identity.write_identity(run, recorded)
    return frozenset()


def _record_late(run: Path, recipe: Recipe, data: PreparedData, step: int) -> Identity:
    """The identity of a run that an earlier version began; says what that means."""
    warn(
        f"{run} began before runs recorded what they are: nothing was recorded of its test images, classes and "
        f"versions to compare with; what they are now, at step {step}, is recorded in {identity.FILE}"
    )
    return identity_of(recipe, data, step).model_copy(update={"references": identity.read_references(run)})


def _warn_of_versions(run: Path, old: dict[str, str], new: dict[str, str]) -> None:
    differing = [f"{name} {old.get(name, 'none')}, now {new[name]}" for name in new if old.get(name) != new[name]]
    if differing:
        warn(f"{run} began with {'; '.join(differing)}: results may differ from those of an uninterrupted run")
