"""Plans of a method that reads fields of the data and arranges a batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.specs import open_source
from kilobatch.launch.planning.fake_step import StepLayout, run_fake_step
from kilobatch.launch.recipes.data import needed_fields
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.trainer.bench import loader, step
from tests.helpers.paper_files import WORDS, add_paper
from tests.helpers.worker_in_process import restored
from tests.launch.conftest import CommandResult

CHANGES = ["method.name=words", "data.test=null", "data.batch=8", "data.views.count=1", "data.views.size=16"]
CHANGES += ["encoder.norm=local", "encoder.width=4", "evaluate.every_epochs=0", "evaluate.final=[]"]
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 16, 16, 3), np.uint8)
FIELDS: dict[str, Any] = {"tokens": np.arange(24 * 5).reshape(24, 5) % 50, "weight": np.ones(24, ">f4")}


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The data of a method that reads tokens and a weight, as a .beton."""
    add_paper(monkeypatch, tmp_path / "papers", "words", WORDS)
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=np.arange(24) % 2, **FIELDS)
    convert(open_source(f"npz:{tmp_path / 'a.npz'}", "train"), tmp_path / "a.beton", progress=False)
    return str(tmp_path / "a.beton")


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_step_has_the_fields_of_the_data_and_what_the_method_arranges(data: str, chunks: int):
    recipe = resolve_recipe("demo", [*CHANGES, f"data.train={data}"])
    assert needed_fields(recipe) == needed_fields(resolve_recipe("demo", [*CHANGES, f"data.train=npz:{data[:-6]}.npz"]))
    step = run_fake_step(recipe, StepLayout(2, 8, chunks), 24, 2, needed_fields(recipe))
    assert step.moments["arrange"]["arranged samples"] == 8 * 3 * 16 * 16 * 4
    assert step.moments["forward"]["arranged samples"] == 8 * 3 * 16 * 16 * 4  # they live as long as the step
    assert step.trained > 50 * 8 and step.backward > step.forward


def test_the_command_finds_the_fields_in_the_data(data: str, kilobatch: Callable[..., CommandResult]):
    with_data = kilobatch("plan", "demo", *CHANGES, f"data.train={data}", "--gpu", "a100")
    assert with_data.code == 0 and "arranged samples" in with_data.out, with_data.err
    absent = kilobatch("plan", "demo", *CHANGES, "data.train=npz:elsewhere.npz", "--images", "24", "--gpu", "a100")
    assert absent.code == 2
    assert "method words reads tokens, weight, whose shapes are those of data.train, and npz:elsewhere" in absent.err
    assert "there is no such file" in absent.err
    other = kilobatch("plan", "demo", *CHANGES, "data.train=digits", "--images", "24", "--gpu", "a100")
    assert "data.train 'digits' has no tokens, weight, which method words reads" in other.err


def test_a_batch_without_fields_is_of_no_use_to_such_a_method(data: str):
    recipe = resolve_recipe("demo", [*CHANGES, f"data.train={data}"])
    with pytest.raises(KeyError, match="tokens"):
        run_fake_step(recipe, StepLayout(2, 8, 1), 24, 2)


def test_bench_measures_the_step_of_such_a_method(
    data: str, kilobatch: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(loader, "SECONDS", 0.01)
    monkeypatch.setattr(step, "SECONDS", 0.0)
    with restored():
        result = kilobatch("bench", "demo", *CHANGES, f"data.train={data}", "--device", "cpu")
    assert result.code == 0, result.err
    printed = " ".join(result.out.split())
    assert "1 x 16" in printed and "words step" in printed, result.out
    assert "written" not in result.out and not (Path("cache") / "bench").exists()
    refused = kilobatch("bench", "demo", "--out", "here.json")
    assert refused.code == 2 and "leave --out or the recipe out" in refused.err
