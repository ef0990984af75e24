"""Folders of pipelines, which pre-train, fine-tune and distil in one run for each stage. Loads no torch.

`runs/NAME/` holds `pipeline.yaml` and a run folder for each stage; a later stage takes what it starts from, or who
teaches it, from the run of the stage before (Chen et al. 2020, arxiv.org/abs/2006.10029, figure 3).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict

from kilobatch.data.files import parse_model, refusing_os_errors, write_whole
from kilobatch.launch.recipes.recipe import load_recipe
from kilobatch.launch.recipes.references import begun
from kilobatch.launch.recipes.settings import dump, read_file
from kilobatch.launch.runs import run_folder

StageName = Literal["pretrain", "finetune", "distill", "scratch"]
STAGES: tuple[StageName, ...] = ("pretrain", "finetune", "distill")
SCRATCH: StageName = "scratch"  # after the others, where it is asked for: the fine-tuning without a start, to compare
# the key in which a stage's recipe names the run of the stage before it
PREDECESSOR_KEY = {"finetune": "method.start", "distill": "method.teacher"}
FILE = "pipeline.yaml"


def _whole(recipes: dict[StageName, str]) -> dict[StageName, str]:
    if tuple(stage for stage in recipes if stage != SCRATCH) not in (STAGES, STAGES[1:], STAGES[2:]):
        raise ValueError(f"the stages are {', '.join(recipes) or 'none'}; they should be {', '.join(STAGES)}")
    return recipes


class Pipeline(BaseModel):
    """What pipeline.yaml holds. recipes: the recipe of each stage, in order; pretrained: the run or file that is used
    instead of a first stage; teacher: that is used instead of the first two."""

    model_config = ConfigDict(extra="forbid")

    recipes: Annotated[dict[StageName, str], AfterValidator(_whole)]
    labels: str | None = None
    pretrained: str | None = None
    teacher: str | None = None
    overrides: list[str] = []

    def write(self, top: Path) -> None:
        write_whole(top / FILE, [dump(self.model_dump(mode="json")).encode()])


def read_pipeline(top: Path) -> Pipeline | None:
    """The content of pipeline.yaml; None for a folder without one. Raises UserError where the file is damaged."""
    path = top / FILE
    if not path.is_file():
        return None
    values = json.dumps(read_file(path).values)
    return parse_model(values, path, Pipeline, "resume its stages one by one", with_key=True, strict=True)


def find_pipeline(name: str) -> Path | None:
    """The folder of a pipeline that is given as a folder or as a name under runs/; None where there is none."""
    return next((top for top in run_folder.candidate_paths(name) if (top / FILE).is_file()), None)


def stage_folders(top: Path) -> list[Path]:
    """The runs of a pipeline, in order; none for a folder that is not a pipeline's."""
    pipeline = read_pipeline(top)
    return [top / stage for stage in pipeline.recipes] if pipeline else []


def stages_around(run: Path) -> tuple[list[Path], list[Path]]:
    """The runs before and after this one in its pipeline; both empty for a run that is not part of a pipeline."""
    stages = stage_folders(run.parent)
    index = next((k for k, stage in enumerate(stages) if stage.name == run.name), None)
    return ([], []) if index is None else (stages[:index], stages[index + 1 :])


def resume_hint(run: Path, lines: Sequence[str] = (), *, alone: bool = False) -> str:
    """The command that goes on with a run that has ended before its end, as a clause: of its pipeline, if it is a stage
    of one, unless it was started alone. lines: its last ones; "" where they name another way already, as after a loss
    that was not finite."""
    if any("kilobatch resume" in line or "start a new run" in line for line in lines):
        return ""
    return f"; go on with: kilobatch resume {run.parent if any(stages_around(run)) and not alone else run}"


def reason_to_wait(run: Path) -> str | None:
    """The reason why a stage may not begin or go on: a stage before it has not finished. None: it may."""
    for before in stages_around(run)[0]:
        if (status := run_folder.status(before)) != "finished":
            return f"{run} waits for {before}, which is {status}; go on with: kilobatch resume {run.parent}"
    if (where := taken_from_original(run)) is not None:
        return (
            f"{run} would take from {where}, a stage of the pipeline that {run.parent} is a copy of, or was moved "
            f"from; kilobatch resume {run.parent} makes it take from its own"
        )
    return None


def taken_from_original(run: Path) -> str | None:
    """The run that a stage's recipe names instead of the stage before it, in the copy of a pipeline's folder or in one
    that was moved. None: it names that stage, has none before it, or has begun: then it goes on with the weights that
    it began with, by their SHA-256."""
    before, _ = stages_around(run)
    if not before or run.name not in PREDECESSOR_KEY or begun(run):
        return None
    recipe, _ = load_recipe(run / "recipe.yaml")
    where = Path(getattr(recipe.method, PREDECESSOR_KEY[run.name].removeprefix("method.")))
    same = where.absolute() == before[-1].absolute() or (where.exists() and where.samefile(before[-1]))
    return None if same else str(where)


def take_from_own_stages(top: Path) -> list[str]:
    """Makes the stages of a pipeline's copy that have not begun take from the stages beside them, not from the
    original's. Returns what has changed, in words."""
    changed = []
    for run in stage_folders(top):
        if (where := taken_from_original(run)) is not None:
            own = stages_around(run)[0][-1].absolute()
            recipe, _ = load_recipe(run / "recipe.yaml", [f"{PREDECESSOR_KEY[run.name]}={json.dumps(str(own))}"])
            with refusing_os_errors(run / "recipe.yaml"):
                write_whole(run / "recipe.yaml", [recipe.dump_yaml().encode()])
            changed.append(f"{run} takes from {own} now, not from {where}")
    return changed
