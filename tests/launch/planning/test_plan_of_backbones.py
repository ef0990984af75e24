"""The plan of networks of libraries and of one's own: the parameters that they have, and blocks computed again."""

from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.planning.fake_step import Step, StepLayout, run_fake_step
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.launch.worker.pretrained import build_of_recipe
from kilobatch.methods.method import DataFacts


def planned(*changes: str) -> Step:
    recipe = resolve_recipe("demo", ["data.batch=16", "data.views.size=32", "encoder.norm=local", *changes])
    step = run_fake_step(recipe, StepLayout(1, 16, 1), 100, 10)
    method = build_of_recipe(recipe, DataFacts(100, 10))
    assert step.trained == sum(p.numel() for p in method.parameters())
    return step


def test_networks_of_libraries_and_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    convnext = ["encoder.name=timm/test_convnext", "encoder.options.drop_path_rate=0.1"]
    plain, again = planned(*convnext), planned(*convnext, "encoder.checkpoint=true")
    assert again.kept < plain.kept and again.backward > plain.backward
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n"
    )
    assert planned(f"encoder.name={tmp_path}/nets.py:net").forward > 0


@pytest.mark.slow
def test_a_network_whose_builder_reads_numbers_out_of_tensors() -> None:
    assert planned("encoder.name=torchvision/regnet_y_400mf").forward > 0


def test_a_size_that_it_does_not_take_is_refused_before_any_step() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=r"timm/test_vit does not take images of 40 x 40 pixels"):
        planned("encoder.name=timm/test_vit", "data.views.size=40")
