"""Printing of recipes' texts and files' names as they are: rich reads `[knn]` as markup and `:cat:` as an emoji."""

import re
from pathlib import Path

import pytest

from kilobatch.launch.cli.reports import bench
from kilobatch.launch.cli.reports.recipes import print_recipe
from kilobatch.launch.recipes import catalogue


def test_a_recipes_opening_is_printed_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "own.yaml").write_text("# train own evaluate.final=[knn]\n# data.train=npz:a:cat:b\nextends: demo\n")
    monkeypatch.chdir(tmp_path)
    print_recipe("own.yaml")
    printed = capsys.readouterr().out
    assert "train own evaluate.final=[knn]" in printed and "data.train=npz:a:cat:b" in printed


def test_the_file_of_rates_is_named_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bench, "_measure", lambda device, ranks, console: ([], {}))  # it takes a minute
    file = tmp_path / ("a" * 80) / "[bold]:cat:.json"
    file.parent.mkdir()
    bench.bench("cpu", 1, file)
    assert f"written: {file}; kilobatch plan RECIPE --measured {file}\n" in capsys.readouterr().out


def test_no_console_draws_emojis():
    """Not even `markup=False` keeps rich from it."""
    rooms = [(Path(catalogue.__file__).parents[2] / room).resolve() for room in ("launch", "trainer", "data")]
    texts = [file.read_text() for room in rooms for file in room.rglob("*.py")]
    consoles = [call for text in texts for call in re.findall(r"\bConsole\([^)]*\)", text)]
    assert len(consoles) > 10 and all("emoji=False" in call for call in consoles), consoles
