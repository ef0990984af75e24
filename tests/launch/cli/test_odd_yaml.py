"""YAML that is well-formed, and that no recipe holds: brackets 2,000 deep, thousands of digits, tags of other types."""

from collections.abc import Callable
from pathlib import Path

import pytest

DEEP = "[" * 2000 + "]" * 2000
TOO_DEEP = "nested more than 50 deep"
ARGUMENTS: dict[str, tuple[list[str], list[str]]] = {
    "deep brackets": (["train", "demo", f"data.train={DEEP}"], ["override 'data.train=[[", TOO_DEEP]),
    "deep mappings": (
        ["plan", "demo", "data.views.crop=" + "{a: [" * 1000 + "1" + "]}" * 1000],
        ["override 'data.views.crop={a: ", TOO_DEEP],
    ),
    "a deep sweep": (
        ["submit", "demo", "--cluster", "local", "--sweep", f"data.views.mean={DEEP}"],
        ["--sweep data.views.mean=[[", TOO_DEEP],
    ),
    "too many digits": (["train", "demo", "data.batch=" + "9" * 5000], ["data.batch is '999", "integer"]),
    "digits in a list": (["train", "demo", f"data.views.mean=[{'9' * 5000}]"], ["5,000 digits is too long"]),
    "half a character": (["train", "demo", 'data.train="\\ud800"'], ["override 'data.train=", "half a character"]),
}
FILES: dict[str, tuple[str, list[str]]] = {
    "deep brackets": (f"data: {DEEP}\n", ["my.yaml line 1", TOO_DEEP]),
    "deep sections": ("".join(f"{' ' * k}a:\n" for k in range(200)), ["my.yaml line 50", TOO_DEEP]),
    "too many digits": (f"extends: demo\ndata: {{batch: {'9' * 5000}}}\n", ["line 2", "5,000 digits is too long"]),
    "a wrong truth value": ("extends: demo\ndata: {batch: !!bool perhaps}\n", ["line 2", "tag:yaml.org,2002:bool"]),
    "a date that is none": ("extends: demo\nrun: {name: !!timestamp x}\n", ["line 2", "tag:yaml.org,2002:timestamp"]),
    "a list for a key": ("extends: demo\n? [1, 2]\n: 3\n", ["line 2", "keys must be text, not a sequence"]),
}


def assert_refused(code: int, err: str, parts: list[str]) -> None:
    assert code == 2 and err.startswith("kilobatch: ") and err.count("\n") == 1 and len(err) < 1000, err
    assert all(part in err for part in parts), err


@pytest.mark.parametrize("case", ARGUMENTS)
def test_on_the_command_line(case: str, kilobatch: Callable):
    arguments, parts = ARGUMENTS[case]
    result = kilobatch(*arguments)
    assert_refused(result.code, result.err, parts)


@pytest.mark.parametrize("case", FILES)
def test_in_a_file(case: str, kilobatch: Callable, tmp_path: Path):
    content, parts = FILES[case]
    (tmp_path / "my.yaml").write_text(content)
    result = kilobatch("train", "my.yaml")
    assert_refused(result.code, result.err, parts)


def test_a_run_whose_name_is_a_date_for_other_readers_of_yaml(kilobatch: Callable):
    """YAML 1.1 has a type for dates, and 2026-99-99 is none."""
    from kilobatch.launch.recipes.recipe import resolve_recipe
    from kilobatch.launch.runs import run_folder

    recipe = resolve_recipe("demo", ["run.name=2026-99-99"])
    run_folder.create_run(recipe.run, "demo", recipe.dump_yaml(), 1)
    result = kilobatch("status")
    assert result.code == 0 and "2026-99-99  new" in result.out
