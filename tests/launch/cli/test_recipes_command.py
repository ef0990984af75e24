"""`kilobatch recipes`: one line for each recipe, and one recipe whole."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.cli.reports.recipes import expected, summary
from kilobatch.launch.recipes import catalogue
from tests.helpers.recordings import in_ascii
from tests.helpers.transcripts import transcript
from tests.launch.conftest import CommandResult


def test_one_line_for_each(tmp_path: Path) -> None:
    """Also in a narrow terminal: lines are for grep."""
    code, printed = transcript(tmp_path, "recipes")
    lines = printed.splitlines()
    assert code == 0 and lines[0].split() == ["recipe", "expected", "what", "it", "is"]
    names = catalogue.recipe_names()
    assert [line.split()[0] for line in lines[1:-2]] == names and lines[-2] == ""
    assert (
        "demo                               94.7 % k-NN, measured  SimCLR on scikit-learn's handwritten digits" in lines
    )
    assert all(len(line) <= 144 for line in lines)
    assert all(summary(catalogue.opening(name)) for name in names)


@pytest.mark.parametrize(
    ("opening", "short", "figure"),
    [
        (["A (1), big (x), as in y: more", "Expect: about 91 % top-1, linear; 92 % b"], "A, big", "about 91 % linear"),
        (["A. B", "Expect: k-NN of 92 % (measured: 94.7 %)"], "A", "94.7 % k-NN, measured"),
        (["A", "Expect: not published; the other's 90.7 % is of b"], "A Expect", "-"),
        (["A kilobatch train a", "Expect: 73.9 and 77.5 % top-1"], "A", "73.9 and 77.5 % top-1"),
        ([], "", "-"),
    ],
)  # fmt: skip
def test_what_is_taken_of_an_opening(opening: list[str], short: str, figure: str) -> None:
    assert (summary(opening), expected(opening)) == (short, figure)


def test_a_shipped_recipe_whole(tmp_path: Path) -> None:
    code, printed = transcript(tmp_path, "recipes", "simclr_v2_digits_distill")
    opening = [in_ascii(line) for line in catalogue.opening("simclr_v2_digits_distill")]
    lines = printed.splitlines()
    assert code == 0 and lines[1 : len(opening) + 2] == [*opening, ""]
    written = {line.split("  #")[0].rstrip(): line.rpartition("# ")[2] for line in lines if "  # " in line}
    assert written["data.batch=238"].endswith("simclr_v2_digits_distill.yaml line 10")
    assert written["data.train=digits"].endswith("demo.yaml line 8")
    assert "kilobatch train simclr_v2_digits_distill" in lines[-1]


def test_a_recipe_of_ones_own(kilobatch: Callable[..., CommandResult], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "# Mine, with two lines:\n#   [more] of it.\nextends: demo\ndata: {batch: 32}\n"
    )
    done = kilobatch("recipes", "mine.yaml")
    assert done.out.startswith("mine.yaml: mine.yaml\nMine, with two lines:\n[more] of it.\n\ndata.train=digits ")
    assert "data.batch=32 " in done.out and "# mine.yaml line 4" in done.out
    refused = kilobatch("recipes", "dmeo")
    assert refused.code == 2 and "did you mean 'demo'?" in refused.err
