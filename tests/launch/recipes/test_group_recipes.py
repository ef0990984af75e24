"""Recipes with several groups of views: a list in data.views, its overrides, refusals and plan."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from kilobatch.data.errors import UserError
from kilobatch.data.views.options import Views
from kilobatch.launch.planning.fake_step import StepLayout, run_fake_step
from kilobatch.launch.planning.machines import find_machine
from kilobatch.launch.planning.memory import peak_memory, waiting_bytes
from kilobatch.launch.planning.photos import Photos
from kilobatch.launch.recipes import changes, checks, method_options
from kilobatch.launch.recipes.recipe import Recipe, read_recipe, recipe_from, resolve_recipe
from kilobatch.trainer.checkpoint.export import whole_metadata

GROUPS = """\
extends: demo
data:
  views:
    - {count: 2, size: 32, mean: [0.1, 0.1, 0.1], std: [0.5, 0.5, 0.5]}
    - {count: 3, size: 16, crop: {scale: [0.05, 0.4]}, ties: [flip]}
"""


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Recipe]:
    path = tmp_path / "groups.yaml"
    path.write_text(GROUPS)
    return lambda *overrides: read_recipe(str(path), [*overrides])[0]


@pytest.fixture
def takes_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = method_options.declared
    monkeypatch.setattr(method_options, "declared", lambda name: replace(declared(name), further_groups=True, views=2))


def test_a_list_is_read_and_dumped(read: Callable[..., Recipe]) -> None:
    recipe = read()
    assert [(group.count, group.size, group.ties) for group in recipe.data.groups] == [(2, 32, ()), (3, 16, ("flip",))]
    assert {(group.mean[0], group.std[0]) for group in recipe.data.groups} == {(0.1, 0.5)}  # the first's
    dumped = yaml.safe_load(recipe.dump_yaml())
    assert isinstance(dumped["data"]["views"], list) and recipe_from(dumped, "a run") == recipe
    one = yaml.safe_load(resolve_recipe("demo", []).dump_yaml())["data"]["views"]
    assert isinstance(one, dict) and one["ties"] == []


def test_overrides_name_a_group_by_its_number(read: Callable[..., Recipe]) -> None:
    recipe = read("data.views.1.size=24", "data.views.1.crop=null", "data.views.0.count=4", "data.views.1.size=40")
    assert [(group.count, group.size) for group in recipe.data.groups] == [(4, 32), (3, 40)]
    assert recipe.data.groups[1].crop is None and recipe.data.groups[1].ties == ("flip",)
    assert read("data.views=[{size: 16}]", "data.views.0.count=5").data.groups[0] == Views(size=16, count=5)
    assert read('data.views=[{"size": 16}]').data.groups == (Views(size=16),)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "data.views.size=24",
            "'data.views.size=24': there is no data.views.size: data.views is a list of 2; name",
        ),
        ("data.views.2.size=24", r"no data.views.2: .* \(data.views.0 to data.views.1\), or give the whole list"),
        ("data.views.1.sise=24", "'data.views.1' has no key 'sise'; did you mean 'size'"),
        ("data.views.1.mean=[0, 0, 0]", r"groups.yaml line 4, override .*: mean of group 1 is \[0.0, .*leave it out"),
        ("data.views.1.size=4", "override 'data.views.1.size=4': data.views.1.size is 4; it should be greater than or"),
        ("data.views.1.blur={kernel: 99}", "data.views.1: blur.kernel 99 reaches past"),
        ("data.views=[]", "data.views: there is no group of views; give one at least"),
        ("data.views=7", r"data.views is 7; it holds keys of its own \(count, size"),
        ("data.views.1.ties=[crops]", "ties.0 is crops; it should be .* did you mean 'crop'"),
    ],
)
def test_what_is_wrong_in_a_group_is_named(override: str, says: str, read: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=says):
        read(override)


def test_a_mapping_has_no_numbers() -> None:
    with pytest.raises(UserError, match="'data.views' has no key '1'"):
        resolve_recipe("demo", ["data.views.1.size=24"])


def refusal(recipe: Recipe, path: Path) -> str:
    with pytest.raises(UserError) as refused:
        checks.check(recipe, 1, read_recipe(str(path), [])[1])
    return str(refused.value)


def test_a_method_of_one_group_refuses_more(read: Callable[..., Recipe], tmp_path: Path) -> None:
    said = refusal(read(), tmp_path / "groups.yaml")
    assert "groups.yaml line 3: data.views has 2 groups of views, but method simclr takes one" in said
    checks.check(read("data.views=[{size: 32}]"), 1, read_recipe("demo", [])[1])


def test_a_methods_views_are_those_of_the_first_group(
    read: Callable[..., Recipe], tmp_path: Path, takes_groups: None
) -> None:
    path = tmp_path / "groups.yaml"
    checks.check(read(), 1, read_recipe(str(path), [])[1])
    said = refusal(read("data.views.0.count=3"), path)
    assert "groups.yaml line 4: data.views.0.count is 3, but method simclr takes 2 views of an image; use 2" in said


def test_each_group_is_compared(read: Callable[..., Recipe]) -> None:
    old, new = (recipe.model_dump(mode="json") for recipe in (read(), read("data.views.1.size=24")))
    assert [str(change) for change in changes._differences(old, new, "")] == ["data.views.1.size: 16, now 24"]
    one = resolve_recipe("demo", []).model_dump(mode="json")
    assert [change.name for change in changes._differences(one, new, "")] == ["data.views"]


def test_an_export_is_prepared_by_the_first_group(read: Callable[..., Recipe]) -> None:
    groups, first = read(), read("data.views=[{size: 32, mean: [0.1, 0.1, 0.1], std: [0.5, 0.5, 0.5]}]")
    given = [whole_metadata(recipe.model_dump(mode="json"), 1, 8, 2) for recipe in (groups, first)]
    assert {key: value for key, value in given[0].items() if key != "recipe"} == {
        key: value for key, value in given[1].items() if key != "recipe"
    }


def test_a_plan_counts_all_groups(read: Callable[..., Recipe]) -> None:
    recipe, cpu, photos = read(), find_machine("cpu"), Photos(0.79 * 256**2, "photographs")
    first, second = recipe.data.groups
    pixels = 3 * (2 * 32**2 + 3 * 16**2)
    assert waiting_bytes(8, recipe.data.groups, cpu) == 3 * 8 * pixels * 4
    layout = StepLayout(1, 8, 1)
    peak = peak_memory(run_fake_step(recipe, layout, 100, 10), layout, 1, 0, recipe.data.groups, cpu)
    assert peak.parts["views"] == (3 + 2) * 8 * pixels * 4
    both, one, other, none = (
        photos.seconds(views, False, None)
        for views in (recipe.data.groups, first, second, first.model_copy(update={"count": 0}))
    )
    assert both - none == pytest.approx((one - none) + (other - none)) and none > 0  # an image is decoded once
