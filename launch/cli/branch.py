"""`kilobatch branch`: a run of its own that goes on from a checkpoint of another one."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kilobatch.data.errors import UserError, warn
from kilobatch.data.files import refusing_os_errors, sha256, sync_folder
from kilobatch.launch.processes.output import say
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.continuation import Continuation, refuse_missing_data
from kilobatch.launch.recipes.data import prepare_data
from kilobatch.launch.recipes.references import begun
from kilobatch.launch.runs import identity, run_folder
from kilobatch.launch.runs.earlier_checkpoint import check_checkpoint
from kilobatch.launch.runs.identity import BranchOrigin, Identity
from kilobatch.trainer.checkpoint.description import DESCRIPTION
from kilobatch.trainer.monitor.metrics_file import truncate_metrics

# Why a file system makes no second name for a file: on another device, of another owner, too many, none at all.
NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


def branch(run: str, name: str, from_step: int | None, continuation: Continuation) -> Path:
    """Makes a run of its own that goes on from a run's checkpoint, and prints the command that trains it.

    name: a path, or a name under runs/; from_step: None: the newest whole checkpoint; continuation: changes that count
    in the new run from there on. Returns its folder. Raises UserError before anything is made.
    """
    source = run_folder.find_run(run)
    target = Path(name) if "/" in name else run_folder.FOLDER / name
    if target.exists():
        raise UserError(f"{target} exists; a branch is a new run: give it another name")
    own = [f"run.name={json.dumps(target.name)}", f"run.folder={json.dumps(str(target.parent))}"]
    recipe, settings = continuation.read(source, own)
    recorded = identity.read_identity(source)
    if recorded is None:
        raise UserError(f"{source} has no {identity.FILE}, which says what it is; resume it once, then branch it")
    workers = run_folder.read_state(source).workers
    checkpoint = _newest(source) if from_step is None else check_checkpoint(source, from_step)
    data = None
    if continuation.overrides or continuation.data_roots:
        refuse_missing_data(source, recipe, settings, "branch")
        check(recipe, workers, settings, begun=begun(source))
    if continuation.overrides:
        data = prepare_data(recipe)
    found = continuation.compare(source, recipe, data, f"kilobatch branch {run} {name} OPTION=VALUE …")
    with _made_whole(target) as made:
        origin = _copy(source, checkpoint, made)
        shutil.copy2(source / "recipe.yaml", made)
        identity.write_identity(made, _at_branch(recorded, origin))
        continuation.write(made, recipe, data, found)
        run_folder.set_status(made, "interrupted", workers)
    say(f"branch: {target}, from step {origin.step} of {source}")
    say(f"go on with: kilobatch resume {target} (on this machine; as a job: with --cluster NAME)")
    return target


def _newest(source: Path) -> Path:
    from kilobatch.trainer.checkpoint.reader import newest  # loads torch

    found = newest(source / "checkpoints", warn)
    if found is None:
        raise UserError(f"{source} has no checkpoint yet, so there is nothing to branch from; train it first")
    return found


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A new folder for a run, which gets its name at the end: so it is whole or absent."""
    made = target.parent / f".branch-{target.name}-{os.getpid()}"
    with refusing_os_errors(target):
        for part in ("checkpoints", "logs", "pictures"):
            (made / part).mkdir(parents=True)
        try:
            yield made
            (made / ".lock").unlink(missing_ok=True)
            made.rename(target)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        sync_folder(target.parent)


def _copy(source: Path, checkpoint: Path, made: Path) -> BranchOrigin:
    """Copies what the run was up to the checkpoint into the new folder: the checkpoint itself, and its curves."""
    try:
        copy = Path(shutil.copytree(checkpoint, made / "checkpoints" / checkpoint.name, copy_function=_link))
    except (shutil.Error, FileNotFoundError) as error:
        if not checkpoint.exists():
            raise UserError(
                f"{checkpoint} was removed while it was copied, as a run that is trained keeps its newest ones only; "
                "branch again"
            ) from error
        raise UserError(f"{checkpoint} could not be copied to {made.parent}: {error}") from error
    step = int(checkpoint.name.removeprefix("step-"))
    if (metrics := source / "metrics.jsonl").exists():
        shutil.copy2(metrics, made)
        truncate_metrics(made / "metrics.jsonl", step)
    return BranchOrigin(run=source.absolute(), step=step, sha256=sha256(copy / DESCRIPTION))


def _link(file: str, to: str) -> None:
    """Gives a checkpoint's file a second name, since these files are never written to again; else copies it."""
    try:
        os.link(file, to)
    except OSError as error:
        if error.errno not in NO_LINK:
            raise
        shutil.copy2(file, to)


def _at_branch(recorded: Identity, origin: BranchOrigin) -> Identity:
    """The run's record, as that of the branch. Changes that were accepted after the checkpoint count in the branch from
    there on, as its recipe has them."""
    accepted = [entry.model_copy(update={"step": min(entry.step, origin.step)}) for entry in recorded.accepted]
    step = min(recorded.step, origin.step)
    return recorded.model_copy(update={"step": step, "accepted": accepted, "branched_from": origin})
