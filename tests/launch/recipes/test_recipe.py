"""Recipes: read, overridden, resolved, written and read back."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes import catalogue, overrides, recipe, sweep
from kilobatch.launch.recipes.catalogue import FOLDER
from kilobatch.launch.recipes.settings import Settings, dump, parse


@pytest.mark.parametrize("name", catalogue.recipe_names())
def test_resolved_recipe_reads_back_equal(name: str, tmp_path: Path):
    first = "data.views.0" if len(recipe.resolve_recipe(name, []).data.groups) > 1 else "data.views"
    resolved = recipe.resolve_recipe(name, ["optimizer.lr=1e-7", "run.seed=3", f"{first}.jitter=null"])
    assert (resolved.optimizer.lr, resolved.run.seed, resolved.data.groups[0].jitter) == (1e-7, 3, None)
    path = tmp_path / "recipe.yaml"
    path.write_text(resolved.dump_yaml())
    assert recipe.load_recipe(path)[0] == resolved
    assert recipe.load_recipe(path)[0] != recipe.resolve_recipe(name, ["run.seed=4"])


@pytest.mark.parametrize("name", catalogue.recipe_names())
def test_recipes_open_with_schema_command_cost_and_expectation(name: str):
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=recipe.schema.json\n")
    opening = "\n".join(catalogue.opening(name))
    for part in (f"kilobatch train {name}", "Cost:", "Expect:"):
        assert part in opening


def test_committed_schema_is_the_generated_one():
    assert json.loads((FOLDER / "recipe.schema.json").read_text()) == recipe.schema(), (
        "write it anew: kilobatch recipes --schema > configs/recipe.schema.json"
    )


def test_schema_knows_methods_bounds_and_requires_nothing():
    schema = recipe.schema()
    text = json.dumps(schema)
    assert '"required": [' not in text
    assert set(schema["properties"]) == {"extends", *recipe.Recipe.model_fields}
    simclr = schema["$defs"]["simclr_options"]
    assert simclr["properties"]["temperature"]["exclusiveMinimum"] == 0
    assert simclr["properties"]["name"]["const"] == "simclr"
    assert simclr["additionalProperties"] is False


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6), ("4.8", 4.8), ("-.5", -0.5), ("1.", 1.0), ("1E3", 1000.0), ("+3", 3), ("0", 0), ("-12", -12),
        ("010", "010"), ("1:30", "1:30"), ("1_000", "1_000"), ("0x10", "0x10"), ("2026-01-01", "2026-01-01"),
        ("off", "off"), ("no", "no"), ("yes", "yes"), ("True", "True"), ("true", True), ("false", False),
        ("null", None), ("~", None), ("''", ""), ("'1e-6'", "1e-6"), ("[1, 2.5, a]", [1, 2.5, "a"]),
        ("folder:/data/a=b", "folder:/data/a=b"), ("{scale: [0.1, 1]}", {"scale": [0.1, 1]}), ("a.b", "a.b"),
        # What the command line passes is the text itself: YAML's comments and mappings would name another folder.
        ("folder:a #b", "folder:a #b"), ("folder:a: b", "folder:a: b"), ("folder: a ", "folder: a "),
        ("folder:a\nb", "folder:a\nb"), ("a #b.beton", "a #b.beton"), ("'folder:a #b'", "folder:a #b"),
        ("folder:[x]", "folder:[x]"), ("folder:{a}", "folder:{a}"), ("npz:*x", "npz:*x"), ("a: b", "a: b"),
        ("- a", "- a"), ("? a", "? a"), ("# a", "# a"), ("---", "---"), ("null.beton", "null.beton"),
        ("@a", "@a"), ("%a", "%a"), ("!a", "!a"), ("! a", "! a"), ("!!str a", "!!str a"), ("&a b", "&a b"),
        ("*a", "*a"), ("`a", "`a"), ("|a", "|a"), ("> a", "> a"), ("null #a", "null #a"), (" a ", " a "),
        ("\ta", "\ta"), ("a\\b", "a\\b"), (" null ", None), (" 5 ", 5),
        ("4.8 # c", 4.8), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_override_values(text: str, value: object):
    read = overrides.read_overrides([f"a.b={text}"]).values["a"]["b"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize("text", ["'a' #b.beton", '"a" # b', "[a, b] # c", "{a: 1} #"])
def test_an_override_of_which_yaml_would_leave_something_out_is_refused(text: str):
    with pytest.raises(UserError, match=r"override 'a.b=.*: '#.*' after the value would be left out; put quotes"):
        overrides.read_overrides([f"a.b={text}"])


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("folder:a: b,folder:[x]", ["folder:a: b", "folder:[x]"]),
        ("'a, #b',c", ["'a, #b'", "c"]),
        ("a #b,c", None),
        ("a ]#,b", None),
        ("@a,b", None),
    ],
)
def test_a_sweep_of_names_is_as_typed_or_refused(text: str, changes: list[str] | None):
    if changes is None:
        with pytest.raises(UserError, match=r"^--sweep a.b="):
            sweep.points([f"a.b={text}"])
    else:
        assert [point.changes for point in sweep.points([f"a.b={text}"])] == [[f"a.b={value}"] for value in changes]


def test_an_override_with_bytes_that_are_not_utf8_is_refused():
    with pytest.raises(UserError, match=r"has bytes that are not UTF-8, which no recipe can hold; rename"):
        overrides.read_overrides(["data.train=folder:caf\udce9"])


def test_any_values_survive_writing_and_reading():
    rng = np.random.default_rng(0)
    awkward = [
        "1e-6",
        "null",
        "true",
        "~",
        "",
        " a",
        "a: b",
        "#a",
        "'",
        "10",
        "1.5",
        "é",
        "\u2028",
        "x\ny",
        "- a",
        "<<",
    ]

    def any_value(depth: int) -> object:
        kind = rng.integers(8 if depth else 6)
        if kind == 0:
            return float(np.frombuffer(rng.bytes(8), np.float64)[0])
        if kind == 1:
            return int(rng.integers(-(2**62), 2**62))
        if kind <= 4:
            return [None, True, False, str(rng.choice(awkward)), float(rng.random() * 10.0 ** rng.integers(-30, 30))][
                rng.integers(5)
            ]
        if kind == 5:
            return "".join(map(chr, rng.integers(32, 127, rng.integers(1, 9))))
        if kind == 6:
            return [any_value(depth - 1) for _ in range(rng.integers(4))]
        return {str(key): any_value(depth - 1) for key in rng.choice(awkward, rng.integers(4), replace=False)}

    for _ in range(300):
        values = {"a": any_value(3)}
        if any(not math.isfinite(number) for number in _floats(values)):
            continue
        assert parse(dump(values), "text")[0] == values


def _floats(value: object) -> list[float]:
    if isinstance(value, float):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [number for item in inner for number in _floats(item)]


def test_extends_changes_what_it_names_and_nothing_else(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("extends: simclr_cifar10\nrun: {seed: 7}\ndata: {batch: 256}\n")
    (tmp_path / "leaf.yaml").write_text("extends: base\ndata:\n  batch: 128\n  views: {jitter: null}\n")
    leaf, settings = recipe.read_recipe(str(tmp_path / "leaf.yaml"), [])
    same = recipe.resolve_recipe("simclr_cifar10", ["run.seed=7", "data.batch=128", "data.views.jitter=null"])
    assert leaf == same
    assert settings.where(("data", "batch")).endswith("leaf.yaml line 3")
    assert settings.where(("run", "seed")).endswith("base.yaml line 2")
    assert settings.where(("method", "temperature")).startswith("configs/simclr_cifar10.yaml line ")


def test_later_overrides_win_and_lists_are_replaced():
    settings = catalogue.read_settings("demo").under(
        overrides.read_overrides(["data.batch=2", "data.views.mean=[0, 0, 0]", "data.batch=4"])
    )
    assert settings.values["data"]["batch"] == 4
    assert settings.values["data"]["views"]["mean"] == [0, 0, 0]
    assert settings.where(("data", "views", "mean", 1)) == "override 'data.views.mean=[0, 0, 0]'"


def test_a_null_group_can_be_given_anew():
    views = recipe.resolve_recipe("demo", ["data.views.crop.scale=[0.5, 1]"]).data.groups[0]
    assert views.crop is not None
    assert views.crop.scale == (0.5, 1.0)


def test_another_method_takes_no_arguments_over():
    base = Settings({"method": {"name": "simclr", "temperature": 0.5}, "run": {"seed": 1}})
    assert base.under(overrides.read_overrides(["method.name=moco"])).values["method"] == {"name": "moco"}
    both = base.under(overrides.read_overrides(["method.queue=8", "method.name=moco"])).values
    assert both == {"method": {"name": "moco", "queue": 8}, "run": {"seed": 1}}
    assert base.under(overrides.read_overrides(["method.name=simclr"])).values == base.values


def test_layers_leave_what_lies_below_alone():
    base = Settings({"a": {"b": [1]}}, {("a", "b"): "x", ("a", "b", 0): "x"})
    over = base.under(Settings({"a": {"b": {"c": 1}}}, {("a", "b", "c"): "y"}))
    assert base.values == {"a": {"b": [1]}}
    assert over.values == {"a": {"b": {"c": 1}}}
    assert ("a", "b", 0) not in over.origins


def test_method_is_built_from_its_options():
    from kilobatch.launch.recipes import method_options
    from kilobatch.methods.networks.build import build_encoder
    from kilobatch.methods.papers.simclr import SimCLR

    resolved = recipe.resolve_recipe("demo", ["method.dim=16"])
    method = method_options.build_method(resolved.method, build_encoder(resolved.encoder))
    assert isinstance(method, SimCLR)
    assert method.temperature == 0.2
    assert resolved.method.model_dump()["dim"] == 16
    assert "simclr" in method_options.method_names()
    assert "losses" not in method_options.method_names()
