"""Published figures in the recipes' headers: each is of the setting that the recipe has, by docs/fidelity.md."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from kilobatch.launch.recipes.catalogue import FOLDER
from kilobatch.launch.recipes.recipe import resolve_recipe

ROOT = Path(__file__).parents[3]
# "    recipe: figure or none, of what; source", then lines of its setting that begin further right.
CLAIM = re.compile(r"^    (\w+): ([\d.]+|none), ([^;]+); (.+)\n((?: {8}.+\n)+)", re.M)
CLAIMS = CLAIM.findall((ROOT / "docs/fidelity.md").read_text("utf-8"))
# What else stands in a header: figures with their own changes of the setting, of other recipes, or measured here.
OTHER = {
    "simsiam_imagenet": {"68.3"},
    "nnclr_imagenet": {"75.6"},
    "swav_imagenet": {"72.1", "73.9", "74.6"},
    "barlow_twins_digits": {"94", "94.2", "33.6", "64.2"},
    "barlow_twins_imagenet": {"71.4"},
    "dino_digits": {"83", "83.9", "33.6", "64.2"},
    "dino_vit_small_imagenet": {"69.3", "76.0"},
    "deepcluster_v2_digits": {"88", "89.4", "33.6", "64.2"},
    "demo": {"92", "94.7", "64"},
    "hcsc_digits": {"95", "96.4", "33.6", "64.2"},
    "instance_discrimination_imagenet": {"52.7", "58.5"},
    "mochi_imagenet": {"67.5"},
    "moco_v2_imagenet": {"71.1"},
    "pcl_digits": {"95", "96.4", "33.6", "64.2"},
    "moco_v3_imagenet": {"72.8", "74.6"},
    "moco_v3_vit_small_imagenet": {"76.7"},
    "pirl_imagenet": {"62.9", "62.6"},
    "simclr_cifar10_solo": {"90.7"},
    "simclr_v2_digits": {"93", "92.8"},
    "simclr_v2_digits_distill": {"94.2", "95.3"},
    "simclr_v2_digits_finetune": {"95", "95.3", "84", "84.4"},
    "simclr_v2_imagenet": {"64.5", "72.1", "78.7", "1", "10", "100"},
    "simclr_v2_imagenet_distill": {"73.9", "77.5", "1", "10"},
    "vicreg_digits": {"94", "94.7", "33.6", "64.2"},
}


def expectation(name: str) -> str:
    """The paragraph Expect of a recipe's header."""
    lines = (FOLDER / f"{name}.yaml").read_text("utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("# Expect:"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("#"))
    return " ".join(line.removeprefix("#").strip() for line in lines[start:end])


@pytest.mark.parametrize(("name", "figure", "of", "source", "setting"), CLAIMS, ids=[claim[0] for claim in CLAIMS])
def test_a_figure_is_of_the_recipes_setting(name: str, figure: str, of: str, source: str, setting: str) -> None:
    if figure != "none":
        assert re.search(rf"\b{re.escape(figure)}\b(?! in the paper)", expectation(name)), expectation(name)
    recipe = resolve_recipe(name, [])
    for word in setting.split():
        path, text = word.split("=")
        value = recipe
        for part in path.split("."):
            value = getattr(value, part)
        assert value == number_or_text(yaml.safe_load(text)), path


def number_or_text(read: Any) -> Any:
    """As a recipe has it: YAML reads 1e-4 as text and [1, 2] as a list."""
    if isinstance(read, list):
        return tuple(map(number_or_text, read))
    return float(read) if isinstance(read, str) and read[0].isdigit() else read


def test_no_header_has_another_figure() -> None:
    known = {name: {figure} for name, figure, *_ in CLAIMS if figure != "none"}
    for file in sorted(FOLDER.glob("*.yaml")):
        found = set(re.findall(r"(\d+(?:\.\d+)?)(?= %|, \d[\d.]* and| and \d[\d.]* %)", expectation(file.stem)))
        assert found <= known.get(file.stem, set()) | OTHER.get(file.stem, set()), file.stem


def test_the_measurements_page_repeats_these_figures() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| (?:about )?([\d.]+) %", (ROOT / "docs/measured.md").read_text("utf-8"), re.M)
    figures = {name: {figure} | OTHER.get(name, set()) for name, figure, *_ in CLAIMS} | {"demo": OTHER["demo"]}
    assert len(rows) >= 10
    assert [(name, figure) for name, figure in rows if figure not in figures.get(name, ())] == []


def test_a_recipe_without_a_figure_says_so() -> None:
    with_one = {name for name, figure, *_ in CLAIMS if figure != "none"} | OTHER.keys()
    for file in sorted(FOLDER.glob("*.yaml")):
        if file.stem not in with_one:
            text = expectation(file.stem)
            assert re.search(r"not measured here|no published figure|accuracy than its teacher", text), file.stem
