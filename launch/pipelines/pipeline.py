"""Pipelines: pre-train, fine-tune, distil, each stage a recipe and a run of its own, in one folder. Loads no torch.

`runs/NAME/` holds `pipeline.yaml` and a run folder for each stage; a later stage takes what it starts from, or who
teaches it, from the run of the stage before (Chen et al. 2020, arxiv.org/abs/2006.10029, figure 3).
"""

import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from kilobatch.data.errors import Refusal
from kilobatch.data.files import write_whole
from kilobatch.launch.recipes.settings import dump, read_file
from kilobatch.launch.runs import run_folder as runs

STAGES = ("pretrain", "finetune", "distill")
TAKES = {"finetune": "method.start", "distill": "method.teacher"}  # where a stage names the run before it
FILE = "pipeline.yaml"


class Pipeline(BaseModel):
    """pipeline.yaml. recipes: of each stage, in order; pretrained: the run or file that stands for the first stage."""

    model_config = ConfigDict(extra="forbid")

    recipes: dict[str, str]
    labels: str | None = None
    pretrained: str | None = None
    overrides: list[str] = []

    def write(self, top: Path) -> None:
        write_whole(top / FILE, [dump(self.model_dump(mode="json")).encode()])


def read(top: Path) -> Pipeline | None:
    """None for a folder that is no pipeline's. Raises Refusal where the file is damaged."""
    path = top / FILE
    if not path.is_file():
        return None
    try:
        return Pipeline.model_validate_json(json.dumps(read_file(path).values), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise Refusal(f"{path} is damaged ({where}: {first['msg']}); resume its stages one by one") from error


def find(name: str) -> Path | None:
    """The folder of a pipeline given as a folder or as a name under runs/; None where it is none."""
    return next((top for top in runs.places(name) if (top / FILE).is_file()), None)


def folders(top: Path) -> list[Path]:
    """The runs of a pipeline, in order."""
    found = read(top)
    return [top / stage for stage in found.recipes] if found else []


def stages_around(run: Path) -> tuple[list[Path], list[Path]]:
    """The runs before and after this one in its pipeline; both empty for a run that stands alone."""
    stages = folders(run.parent)
    at = next((k for k, stage in enumerate(stages) if stage.name == run.name), None)
    return ([], []) if at is None else (stages[:at], stages[at + 1 :])


def too_early(run: Path) -> str | None:
    """Why a stage may not begin or go on: what it takes from the stage before is not there yet. None: it may."""
    for before in stages_around(run)[0]:
        if (status := runs.status(before)) != "finished":
            return f"{run} waits for {before}, which is {status}; go on with: kilobatch resume {run.parent}"
    return None
