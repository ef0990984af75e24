"""Folders of pipelines, which pre-train, fine-tune and distil in one run for each stage. Loads no torch.

`runs/NAME/` holds `pipeline.yaml` and a run folder for each stage; a later stage takes what it starts from, or who
teaches it, from the run of the stage before (Chen et al. 2020, arxiv.org/abs/2006.10029, figure 3).
"""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from kilobatch.data.files import parse_model, write_whole
from kilobatch.launch.recipes.settings import dump, read_file
from kilobatch.launch.runs import run_folder

STAGES = ("pretrain", "finetune", "distill")
# the key in which a stage's recipe names the run of the stage before it
PREDECESSOR_KEY = {"finetune": "method.start", "distill": "method.teacher"}
FILE = "pipeline.yaml"


class Pipeline(BaseModel):
    """What pipeline.yaml holds. recipes: the recipe of each stage, in order; pretrained: the run or file that is used
    instead of a first stage."""

    model_config = ConfigDict(extra="forbid")

    recipes: dict[str, str]
    labels: str | None = None
    pretrained: str | None = None
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


def reason_to_wait(run: Path) -> str | None:
    """The reason why a stage may not begin or go on: a stage before it has not finished. None: it may."""
    for before in stages_around(run)[0]:
        if (status := run_folder.status(before)) != "finished":
            return f"{run} waits for {before}, which is {status}; go on with: kilobatch resume {run.parent}"
    return None
