"""A run that goes on with another recipe: options and moved data that the command line names. Loads no torch."""

import json
import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor, inf
from pathlib import Path
from typing import TYPE_CHECKING

from kilobatch.data.beton import verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.files import refusing_os_errors, write_whole
from kilobatch.data.sources.specs import path_of, spec_at
from kilobatch.launch.recipes import changes, method_options
from kilobatch.launch.recipes.data import PreparedData, with_absolute_paths
from kilobatch.launch.recipes.outside.source_files import FILE_OF
from kilobatch.launch.recipes.overrides import key_of
from kilobatch.launch.recipes.recipe import Recipe, load_recipe
from kilobatch.launch.recipes.references import newest_description, references, with_references
from kilobatch.launch.recipes.settings import Settings
from kilobatch.launch.runs import run_folder
from kilobatch.launch.runs.identity import Change
from kilobatch.methods.parameter_groups import rule_of
from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.optim.options import scaled_lr
from kilobatch.trainer.optim.schedules import lr_at, total_steps

if TYPE_CHECKING:
    from kilobatch.methods.method import Method

_OF_RATE = ("schedule", "optimizer.lr", "optimizer.scaling", "data.batch")

SHAPING = "method.", "encoder.", "engine.adversarial"  # options by which tensors have other shapes


@dataclass(frozen=True)
class Continuation:
    """The changes with which a run goes on.

    overrides: section.key=value, each of which is meant; data_roots: OLD=NEW, folders of data that have moved; accept:
    whether whatever else has changed since the run began is meant, too.
    """

    overrides: tuple[str, ...] = ()
    data_roots: tuple[str, ...] = ()
    accept: bool = False

    @property
    def records(self) -> bool:
        """Whether changes may have to be recorded, for which the data are looked at."""
        return bool(self.overrides) or self.accept

    def read(self, run: Path, own: Sequence[str] = ()) -> tuple[Recipe, Settings]:
        """The run's recipe with the changes on top, and where each of its values was written. Nothing is written.

        own: further overrides, of the command itself. Raises UserError for what is wrong in them.
        """
        file = run / "recipe.yaml"
        before, settings = load_recipe(file)
        for text in self.overrides:
            if ".".join(key_of(text)) in changes.OF_FOLDER:
                raise UserError(
                    f"override '{text}': {run} stays where it is; for a run of another name: kilobatch branch {run} NEW"
                )
        given = [*moved_data(before, self.data_roots), *self.overrides, *own]
        if not given:
            return before, settings
        recipe, settings = load_recipe(file, given)
        return _with_absolute_paths(recipe, before), settings

    def compare(self, run: Path, recipe: Recipe, data: PreparedData | None, command: str = "") -> list[Change]:
        """The changes since the run began. data: None: the recipe alone is compared; command: by which others than
        these changes are meant, "": resume.

        Raises UserError for those that are not meant, and for those that no checkpoint can go on with.
        """
        found = changes.changes_of(run, recipe, data) if data else changes.recipe_changes(run, recipe)
        if not self.accept:
            foreign = [change for change in found if not self._is_meant(change)]
            words = [*(word for root in self.data_roots for word in ("--data-root", root)), *self.overrides]
            resume = shlex.join(["kilobatch", "resume", str(run), "--accept-changes", *words])
            changes.refuse_changes(run, foreign, command or resume)
        if data:
            changes.refuse_other_shapes(run, recipe, data, found)
            _refuse_other_tensors(run, recipe, data, found)
        return found

    def write(self, run: Path, recipe: Recipe, data: PreparedData | None, found: list[Change]) -> None:
        """Writes the recipe, where it is another one, and records the changes that were found; prints both. The caller
        has locked the run.

        recipe.yaml is written first. Killed in between, the run has a recipe that differs from its record: the next
        resume lists what differs, as for a recipe that was edited, and the same command again completes it. The other
        way round, the record would say that steps were trained with values that no step has seen.
        """
        before, _ = load_recipe(run / "recipe.yaml")
        said = [*_describe_moves(before, recipe), *describe_schedule(run, recipe, found)]
        if recipe != before:
            with refusing_os_errors(run / "recipe.yaml"):
                write_whole(run / "recipe.yaml", [recipe.dump_yaml().encode()])
        if found:
            assert data is not None, "changes that are meant are found in prepared data"
            changes.record_accepted(run, recipe, data, found)
        for line in said:
            print(line, flush=True)

    def _is_meant(self, change: Change) -> bool:
        """Whether the command line names the option of a change, a part of it, or the section that it is in."""
        options = [tuple(change.name.rpartition(" ")[2].split("."))]  # "images of data.train" are of data.train
        if change.name.startswith("labelled"):
            options += [("data", "labels"), ("data", "order")]  # a long tail leaves others of them
        typed = [key_of(text) for text in self.overrides]
        typed += [("method",)] if ("method", "name") in typed else []
        return any(all(a == b for a, b in zip(key, option, strict=False)) for key in typed for option in options)


def _refuse_other_tensors(run: Path, recipe: Recipe, data: PreparedData, found: list[Change]) -> None:
    """Raises UserError where changes of the method, the encoder, or the number of images or classes give its tensors
    other names, shapes or places, or move the beginning of some of them across the checkpoint, so that none fits. Loads
    torch where there are such changes: the method is built as it was, and as it would be."""
    images = verify_beton(data.train.beton)
    extents = changes.recorded_extent(run), (images.samples, len(images.classes))
    shaping = [change for change in found if change.name.removeprefix(FILE_OF).startswith(SHAPING)]
    if extents[0] not in (None, extents[1]):
        shaping += [change for change in found if change.name.endswith("data.train")]
    if not shaping or not changes.newest_step(run):
        return
    before = changes.recorded_recipe(run)
    assert before is not None, "what has changed was recorded"
    methods = _built(before, extents[0] or extents[1]), _built(recipe, extents[1])
    old, new = map(_shapes, methods)
    for name in old | new:
        if old.get(name) != new.get(name):
            would = f"{new[name]}, and is {old.get(name, 'absent')}" if name in new else "absent"
            raise UserError(
                f"no checkpoint of {run} can go on with {'; '.join(map(str, shaping))}: {name} would be {would}; put "
                "the old value back, or start a new run"
            )
    per_epoch = newest_description(run).get("steps_per_epoch")
    if per_epoch and (problem := moved_beginning(*methods, changes.newest_step(run), per_epoch)):
        raise UserError(f"no checkpoint of {run} can go on with {'; '.join(map(str, shaping))}: {problem}")


def moved_beginning(before: "Method", after: "Method", step: int, per_epoch: int) -> str | None:
    """Says of which parameters the changed method lets the training begin on the other side of the last step that is
    done; None: of none. step: the number of steps that are done.

    Parameters that wait have no momentum, and a count of steps in which they were not updated; those that have begun
    are not to wait again, as what their momentum holds would be of long ago. Frozen ones have no such state.
    """
    names = [name for name, _ in after.named_parameters()]
    for name in names:
        old, new = (rule_of(name, method.groups()).from_epoch for method in (before, after))
        had, would_have = ((step - 1) / per_epoch >= begins for begins in (old, new))
        if had == would_have or inf in (old, new):
            continue
        was = f"has been trained since epoch {old:g}" if had else f"is not trained before epoch {old:g}"
        bound = f"{floor(100 * (step - 1) / per_epoch) / 100:g} or before"
        if not had:
            bound = f"{ceil(100 * step / per_epoch) / 100:g} or later"
        return (
            f"{name} {was}, and would be from epoch {new:g} on, while step {step} of {per_epoch} an epoch is done; "
            f"let it begin at epoch {bound}, or branch from a checkpoint before both"
        )
    return None


def _built(recipe: Recipe, extent: tuple[int, int]) -> "Method":
    """The recipe's method. extent: how many images and classes it is for."""
    from kilobatch.methods.method import DataFacts
    from kilobatch.methods.networks.build import build_encoder
    from kilobatch.trainer.adversarial import add_norms

    method = method_options.build_method(recipe.method, build_encoder(recipe.encoder, recipe.data.sizes))
    method.prepare(DataFacts(*extent))
    if recipe.engine.adversarial:
        add_norms(method)
    return method


def _shapes(method: "Method") -> dict[str, str]:
    """The shape of each of its tensors, and whether each rank holds its own."""
    own = method.own_buffers
    shapes = {name: str(tuple(tensor.shape)) for name, tensor in method.state_dict().items()}
    return {name: f"{shape}, each rank its share" if name in own else shape for name, shape in shapes.items()}


def moved_data(recipe: Recipe, roots: Sequence[str]) -> list[str]:
    """The overrides by which a recipe's data lie in NEW where they lay in OLD. roots: OLD=NEW, a folder or file each.

    Data that lie in NEW already, as after a kill, stay. Raises UserError where NEW is absent, or OLD is the beginning
    of no path.
    """
    given: list[str] = []
    for text in roots:
        old_text, equals, new_text = text.partition("=")
        if not (old_text and equals and new_text):
            raise UserError(f"--data-root '{text}' is not of the form OLD=NEW, such as /scratch/images=/data/images")
        old, new = (Path(part).expanduser().absolute() for part in (old_text, new_text))
        if not new.exists():
            raise UserError(f"--data-root {text}: {new} does not exist; name the folder in which the data lie now")
        paths = dict(_data_paths(recipe))
        inner = new.is_relative_to(old)
        moved = {
            option: new / path.relative_to(old)
            for option, path in paths.items()
            if path.is_relative_to(old) and not (inner and path.is_relative_to(new))
        }
        if not moved and not any(path.is_relative_to(new) for path in paths.values()):
            listed = ", ".join(f"{option} {path}" for option, path in paths.items()) or "they are not files"
            raise UserError(f"--data-root {text}: no data of this run lie in {old} ({listed}); name a folder of these")
        given += [f"{option}={json.dumps(_value(recipe, option, path))}" for option, path in moved.items()]
    return given


def _data_paths(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The paths of a recipe's data by their options."""
    for option, spec in (("data.train", recipe.data.train), ("data.test", recipe.data.test)):
        if spec is not None and (path := path_of(spec)) is not None:
            yield option, path
    if recipe.data.labels.list is not None:
        yield "data.labels.list", Path(recipe.data.labels.list).expanduser().absolute()


def _value(recipe: Recipe, option: str, path: Path) -> str:
    """The value of an option of data, of the same kind as before, at another path."""
    specs = {"data.train": recipe.data.train, "data.test": str(recipe.data.test)}
    return spec_at(specs[option], path) if option in specs else str(path)


def refuse_missing_data(run: Path, recipe: Recipe, settings: Settings, command: str) -> None:
    """Raises UserError for data that are not where the recipe says, with the way to name where they are now."""
    missing = {option: path for option, path in _data_paths(recipe) if not path.exists()}
    if not missing:
        return
    option, path = next(iter(missing.items()))
    old = os.path.commonpath([path.parent for path in missing.values()])
    raise UserError(
        f"{settings.where(tuple(option.split('.')))}: {option}: {path} does not exist; put it back, or, where the data "
        f"have moved: kilobatch {command} {run} --data-root {shlex.quote(old)}=NEW"
    )


def _describe_moves(before: Recipe, after: Recipe) -> Iterator[str]:
    now = dict(_data_paths(after))
    for option, path in _data_paths(before):
        if option in now and now[option] != path:
            yield f"{option}: {path}, now {now[option]}"


def _with_absolute_paths(recipe: Recipe, before: Recipe) -> Recipe:
    """The recipe with absolute paths. References that were not changed stay as they are: by these words identity.json
    knows what they stand for."""
    former = references(before)
    unchanged = {option: where for option, where in references(recipe).items() if where == former.get(option)}
    return with_references(with_absolute_paths(recipe), unchanged)


def steps_left(run: Path, epochs: int) -> int:
    """Steps from the newest checkpoint, whole or not, to the end of so many epochs; 0 where that is not known."""
    newest = max(list_checkpoints(run / "checkpoints"), default=None)
    per_epoch = newest_description(run).get("steps_per_epoch")
    return 0 if newest is None or per_epoch is None else max(0, epochs * per_epoch - newest)


def refuse_finished(run: Path, recipe: Recipe) -> None:
    """Raises UserError for a run that has finished, unless the recipe has more epochs than are done."""
    if run_folder.status(run) == "finished" and not steps_left(run, recipe.schedule.epochs):
        raise UserError(
            f"{run} has finished; nothing is left to resume (kilobatch eval {run}, or export); for more epochs than "
            f"are done: kilobatch resume {run} schedule.epochs={2 * recipe.schedule.epochs}, say; from an earlier "
            f"step: kilobatch branch {run} NEW --at STEP"
        )


def describe_schedule(run: Path, recipe: Recipe, found: list[Change]) -> Iterator[str]:
    """Lines that say how many epochs there are now, and what becomes of the learning rate at the next step; none where
    neither has changed."""
    if not any(change.name.startswith(_OF_RATE) for change in found):
        return
    before = changes.recorded_recipe(run)
    assert before is not None, "what has changed was recorded"
    step, per_epoch = changes.newest_step(run), newest_description(run).get("steps_per_epoch")
    old, new = before.schedule, recipe.schedule
    longer = "" if old.epochs == new.epochs else f" over {new.epochs} instead of {old.epochs} epochs"
    if longer:
        yield f"schedule.epochs is {new.epochs} now, and was {old.epochs}"
    if per_epoch is None:
        return
    if step >= total_steps(new, per_epoch):
        yield f"step {step} of {total_steps(new, per_epoch)} is done: it ends at once, with the checkpoint that it has"
        return
    rates = [lr_at(r.schedule, scaled_lr(r.optimizer, r.data.batch), step, per_epoch) for r in (before, recipe)]
    name = new.name if old.name == new.name else f"{new.name} instead of {old.name}"
    goes = f"goes from {rates[0]:.4g} to {rates[1]:.4g}" if rates[0] != rates[1] else f"stays at {rates[1]:.4g}"
    yield f"{name}{longer}: the learning rate at step {step} {goes}"
