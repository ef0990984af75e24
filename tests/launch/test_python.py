"""Training from Python: changes as the command line has them, and how the workers' end becomes an exception."""

from pathlib import Path
from typing import Any

import pytest

import kilobatch
from kilobatch.launch.processes import launcher
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.python import overrides
from kilobatch.launch.recipes.recipe import resolve_recipe

TINY: dict[str, Any] = {"run__device": "cpu", "data__views": {"size": 16}, "optimizer__lr": 1e-7}


def test_changes_are_the_command_lines() -> None:
    changes = {"schedule": {"epochs": 9}, "data__train": 'folder:a "b": ü #c', "data__test": None, "seed": 4, **TINY}
    recipe = resolve_recipe("demo", overrides(changes))
    assert (recipe.schedule.epochs, recipe.run.seed, recipe.optimizer.lr) == (9, 4, 1e-7)
    assert recipe.schedule.warmup_epochs == resolve_recipe("demo", []).schedule.warmup_epochs
    assert (recipe.data.train, recipe.data.test) == ('folder:a "b": ü #c', None)
    assert overrides({"method__start": Path("a/b"), "evaluate__final": ("knn",)}) == [
        'method.start="a/b"',
        'evaluate.final=["knn"]',
    ]
    with pytest.raises(kilobatch.UserError, match="optimizer__lr is a set; use a number, text"):
        overrides({"optimizer__lr": {1}})


@pytest.mark.parametrize(
    ("kind", "raised"), [("failed", RuntimeError), ("interrupted", KeyboardInterrupt), ("refused", kilobatch.UserError)]
)
def test_how_the_workers_ended(
    kind: Any, raised: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "run_workers", lambda *arguments, **named: RunOutcome(kind, 0, lines=["why"]))
    with pytest.raises(raised, match=None if raised is KeyboardInterrupt else "runs/mine"):
        kilobatch.train("demo", workers=1, run__name="mine", data__test=None, **TINY)
    run = kilobatch.Run("mine")
    assert run.recipe.optimizer.lr == 1e-7 and repr(run) == "Run('runs/mine')"
    assert run.status == ("interrupted" if kind == "interrupted" else "failed")


def test_refusals_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kilobatch.UserError, match="did you mean 'temperature'"):
        kilobatch.train("demo", method__temprature=1)
    with pytest.raises(kilobatch.UserError, match="there is no run 'nothing'"):
        kilobatch.Run("nothing")
    with pytest.raises(kilobatch.UserError, match="there is no run 'nothing'"):
        kilobatch.evaluate("nothing", "knn")
    assert not [*tmp_path.iterdir()]
