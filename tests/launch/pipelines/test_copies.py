"""The copy of a pipeline's folder, and one that was moved, go on with their own stages."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.pipelines.pipeline import reason_to_wait, take_from_own_stages
from kilobatch.launch.pipelines.stages import PipelineRequest, create_runs, plan_pipeline
from kilobatch.launch.recipes.recipe import load_recipe
from kilobatch.launch.recipes.references import references
from kilobatch.launch.runs import run_folder
from tests.launch.conftest import CommandResult

TOP, OTHER = Path("runs/mine"), Path("runs/other")


@pytest.fixture
def top(kilobatch: Callable[..., CommandResult]) -> Path:
    """A pipeline whose first stage has finished; it has lost its checkpoints, so that none of the others begins."""
    create_runs(planned := plan_pipeline(PipelineRequest("simclr_v2_digits", []), "mine"), 1)
    run_folder.set_status(TOP / "pretrain", "finished", 1)
    return planned.top


def taken(stage: Path) -> dict[str, str]:
    return references(load_recipe(stage / "recipe.yaml")[0])


@pytest.mark.parametrize("how", [shutil.copytree, shutil.move])
def test_another_folder_takes_from_its_own_stages(how: Callable[..., object], top: Path, kilobatch: Callable):
    original = {path: path.read_bytes() for path in top.rglob("*") if path.is_file()}
    assert take_from_own_stages(top) == []
    how(top, OTHER)
    result = kilobatch("resume", "other/finetune")
    assert result.code == 2 and f"would take from {top.absolute() / 'pretrain'}, a stage of the pipeline" in result.err
    assert result.err.endswith("kilobatch resume runs/other makes it take from its own\n")
    result = kilobatch("resume", "other")
    assert result.code == 2 and "Traceback" not in result.err
    own = OTHER.absolute() / "pretrain"
    assert f"runs/other/finetune takes from {own} now, not from {top.absolute() / 'pretrain'}\n" in result.err
    assert f"method.start '{own}': it has no checkpoint yet" in result.err
    assert taken(OTHER / "finetune") == {"method.start": str(own)}
    assert taken(OTHER / "distill") == {"method.teacher": str(OTHER.absolute() / "finetune")}
    assert reason_to_wait(OTHER / "finetune") is None and take_from_own_stages(OTHER) == []
    if how is shutil.copytree:
        assert {path: path.read_bytes() for path in original} == original


def test_the_same_folder_by_another_path_is_no_copy(top: Path):
    Path("link").symlink_to(top.absolute())
    assert take_from_own_stages(Path("link")) == []


def test_a_stage_that_has_begun_keeps_what_it_began_with(top: Path):
    shutil.copytree(top, OTHER)
    (OTHER / "finetune" / "checkpoints" / "step-00000003").mkdir()
    run_folder.set_status(OTHER / "finetune", "interrupted", 1)
    assert reason_to_wait(OTHER / "finetune") is None
    assert [change.split()[0] for change in take_from_own_stages(OTHER)] == ["runs/other/distill"]
    assert taken(OTHER / "finetune") == {"method.start": str(top.absolute() / "pretrain")}
