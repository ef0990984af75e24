"""Reads what a run's folder says of the run, and names the record that is damaged. Loads no torch."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from kilobatch.data.errors import UserError
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import Attempt, JobFile
from kilobatch.launch.runs.run_folder import State

# libyaml's loader takes a seventh of the time; it is not everywhere.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Records:
    """state: None without state.json; job: None for a run that was never submitted."""

    state: State | None
    job: JobFile | None
    attempts: list[Attempt]


def read_records(folder: Path) -> Records:
    """The records of a run. Raises UserError for the first one that is damaged or cannot be read."""
    try:
        state = run_folder.read_state(folder) if (folder / "state.json").exists() else None
        records = Records(state, job_history.read_job_file(folder), job_history.read_attempts(folder, strict=True))
        _check_recipe_file(folder / "recipe.yaml")
    except OSError as error:
        raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
    return records


def _check_recipe_file(path: Path) -> None:
    """Raises UserError where recipe.yaml does not hold sections up to the last, `run`. Their options are checked where
    they are used, since an earlier version may have had others."""
    try:
        values = yaml.load(path.read_bytes(), _LOADER)
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        problem = " ".join(str(error).split())[:120]
    else:
        whole = isinstance(values, dict) and "run" in values and all(isinstance(part, dict) for part in values.values())
        if whole:
            return
        problem = "it does not hold sections up to `run`"
    raise UserError(
        f"{path} is damaged ({problem}); put the file back: each checkpoint's checkpoint.json holds the recipe, too"
    )
