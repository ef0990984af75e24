"""Pipelines of recipes of one's own: the stages that they lack are derived; the fine-tuned network from scratch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.pipelines.pipeline import read_pipeline, take_from_own_stages
from kilobatch.launch.pipelines.stages import PipelinePlan, PipelineRequest, check_stages, create_runs, plan_pipeline
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.recipe import Recipe, load_recipe
from tests.helpers.transcripts import transcript
from tests.launch.conftest import CommandResult

LARGE = """\
extends: simclr_v2_imagenet
data: {train: 'npz:some.npz', test: 'npz:some.npz', batch: 64, views: {size: 96}}
evaluate: {final: [knn]}
"""
NOTES = """\
finetune: digits_finetune.yaml is not there: as simclr_v2_digits_finetune, with the images, views and encoder of \
digits.yaml (convnet, batch 64, 200 epochs)
distill: digits_distill.yaml is not there: as simclr_v2_digits_distill, with the images, views and encoder of \
digits.yaml (convnet, batch 256, 100 epochs)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With mine.yaml, whose images are 200 of two classes and whose network is a ResNet-50."""
    monkeypatch.chdir(tmp_path)
    np.savez("some.npz", images=np.zeros((200, 9, 9), np.uint8), labels=np.arange(200) % 2)
    Path("mine.yaml").write_text(LARGE)
    return tmp_path


def planned(recipe: str = "mine.yaml", *changes: str, **options: object) -> tuple[PipelinePlan, dict[str, Recipe]]:
    """A plan whose stages the checks have passed, and their recipes."""
    plan = plan_pipeline(PipelineRequest(recipe, [*changes], **options), "p")  # type: ignore[arg-type]
    check_stages(plan, lambda recipe, settings, awaited: check(recipe, 2, settings, awaited=awaited))
    return plan, {stage.name: stage.recipe for stage in plan.stages}


def test_the_stages_of_a_recipe_that_init_wrote(kilobatch: Callable[..., CommandResult], tmp_path: Path) -> None:
    """Also what is said of them, before the scripts of a dry run."""
    assert kilobatch("init", "digits", "--method", "simclr_v2", "--gpu", "cpu").code == 0
    arguments = ["--labels", "5%", "--name", "p", "--dry-run", "--cluster", "local", "--workers-per-node", "2"]
    code, printed = transcript(tmp_path, "pipeline", "digits.yaml", *arguments)
    assert code == 0 and printed.startswith(NOTES), printed


def test_images_views_and_encoder_are_those_of_the_recipe(folder: Path) -> None:
    plan, recipes = planned(labels="10%")
    first, second, third = recipes.values()
    names = ["mine.yaml", "simclr_v2_imagenet_finetune", "simclr_v2_imagenet_distill"]
    assert [stage.recipe_name for stage in plan.stages] == names
    for recipe in (second, third):
        assert (recipe.data.train, recipe.data.test) == (f"npz:{folder}/some.npz",) * 2
        views = recipe.data.groups[0]
        assert views.size == 96 and views.count == 1 and views.jitter is None
        assert recipe.data.labels.share == 0.1 and recipe.evaluate.final == ("classify",)
    assert second.encoder == first.encoder and first.encoder.sk_ratio and second.optimizer.lr == 0.002
    assert second.data.batch == 16 and second.data.unlabelled == "drop"  # of 20 labelled images
    assert second.schedule.epochs == 200 and second.method.model_dump()["layer"] == 1
    assert (third.encoder.name, third.encoder.sk_ratio) == ("resnet18", 0)
    assert third.data.batch == 64 and third.schedule.epochs == 400 and third.data.unlabelled == "keep"
    assert third.optimizer == first.optimizer


def test_what_is_derived_can_be_changed(folder: Path) -> None:
    changes = ["encoder.sk_ratio=0", "finetune.data.batch=8", "distill.encoder.name=resnet34", "seed=7"]
    _, recipes = planned("mine.yaml", *changes)
    assert recipes["finetune"].optimizer.lr == 0.005  # the paper's, without selective kernels
    assert recipes["finetune"].data.labels.all and recipes["finetune"].method.model_dump()["layer"] == 0
    assert recipes["finetune"].data.batch == 8 and recipes["distill"].encoder.name == "resnet34"
    assert [recipe.run.seed for recipe in recipes.values()] == [7] * 3
    _, recipes = planned("mine.yaml", self_distill=True)
    assert recipes["distill"].encoder == recipes["pretrain"].encoder
    assert recipes["distill"].method.model_dump()["temperature"] == 0.1


def test_one_stage_beside_the_recipe_is_taken(folder: Path) -> None:
    Path("mine_finetune.yaml").write_text(
        "extends: simclr_v2_imagenet_finetune\n"
        "data: {train: 'npz:some.npz', test: 'npz:some.npz', batch: 100, views: {size: 96}}\n"
    )
    plan, recipes = planned()
    assert [stage.recipe_name for stage in plan.stages] == [
        "mine.yaml", "mine_finetune.yaml", "simclr_v2_imagenet_distill"
    ]  # fmt: skip
    assert len(plan.notes) == 1 and recipes["finetune"].data.batch == 100


def test_refusals_name_the_recipe_and_the_stage(folder: Path) -> None:
    divides = r"mine.yaml, for this stage: data.batch 33 does not divide over 2"
    with pytest.raises(UserError, match=rf"^finetune: 2 mistakes:\n  {divides}"):
        planned("mine.yaml", "pretrain.data.batch=66", labels="1%")
    Path("other.yaml").write_text(LARGE.replace("simclr_v2_imagenet", "simclr_imagenet"))
    with pytest.raises(UserError, match=r"needs the recipe 'other_finetune.yaml'.*method.name=simclr_v2 needs none"):
        planned("other.yaml")


@pytest.mark.parametrize("recipe", ["mine.yaml", "simclr_v2_digits"])
def test_from_scratch_is_the_fine_tuning_without_a_start(recipe: str, folder: Path) -> None:
    plan, recipes = planned(recipe, "finetune.schedule.epochs=7", "scratch.optimizer.lr=0.5", scratch=True)
    assert list(recipes) == ["pretrain", "finetune", "distill", "scratch"]
    assert recipes["scratch"].method.model_dump()["start"] is None
    tuned = recipes["finetune"].model_dump()
    tuned["method"]["start"], tuned["optimizer"]["lr"], tuned["run"]["name"] = None, 0.5, "scratch"
    assert recipes["scratch"].model_dump() == tuned and tuned["schedule"]["epochs"] == 7
    create_runs(plan, 1)
    found = read_pipeline(plan.top)
    assert found is not None and list(found.recipes) == list(recipes)
    plan.top.rename("runs/other")
    assert len(take_from_own_stages(Path("runs/other"))) == 2  # not scratch, which takes from none
    assert load_recipe(Path("runs/other/scratch/recipe.yaml"))[0].method == recipes["scratch"].method


def test_a_stage_that_was_not_asked_for(kilobatch: Callable[..., CommandResult]) -> None:
    refused = kilobatch("pipeline", "simclr_v2_digits", "scratch.seed=1", "--workers", "1")
    assert refused.code == 2 and "there is no stage scratch here, --scratch adds it" in refused.err
