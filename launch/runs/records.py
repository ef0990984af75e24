"""Reads what a run's folder says of the run, and names the record that is damaged. Loads no torch."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from kilobatch.data.errors import UserError
from kilobatch.data.files import read_record, unreadable
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import Attempt, JobFile
from kilobatch.launch.runs.run_folder import State

# libyaml's reader takes a seventh of the time; it is not everywhere.
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
    except OSError as error:
        raise UserError(unreadable(folder, error)) from error
    _check_recipe_file(folder / "recipe.yaml")
    return records


def _check_recipe_file(path: Path) -> None:
    """Raises UserError where recipe.yaml does not hold sections up to the last, `run`. Their options are checked where
    they are used, since an earlier version may have had others."""
    way_out = "put the file back: each checkpoint's checkpoint.json holds the recipe, too"
    try:
        sections = _sections(read_record(path))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {way_out}") from error
    except (yaml.YAMLError, UnicodeError) as error:
        problem = " ".join(str(error).split())[:120]
    else:
        if "run" in sections and all(sections.values()):
            return
        problem = "it does not hold sections up to `run`"
    raise UserError(f"{path} is damaged ({problem}); {way_out}")


def _sections(content: bytes) -> dict[str, bool]:
    """The keys of a YAML mapping, and whether each holds a mapping; none for another value.

    Event by event: libyaml's reader of whole values is recursive, and what is nested deep ends the process. No value is
    made, as YAML 1.1 has types, such as dates, that recipes have not.
    """
    found: dict[str, bool] = {}
    key, depth = None, 0
    for event in yaml.parse(content, _LOADER):
        if depth == 1 and isinstance(event, yaml.NodeEvent):
            if key is None:
                key = getattr(event, "value", "")
            else:
                found[key], key = isinstance(event, yaml.MappingStartEvent), None
        elif depth == 0 and isinstance(event, yaml.NodeEvent) and not isinstance(event, yaml.MappingStartEvent):
            return {}
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
    return found
