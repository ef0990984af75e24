"""Files of one's own that a recipe names: found, read without being run, part of what a run is, refused where they have
moved or changed."""

from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.cli.reports.new_method import write_method
from kilobatch.launch.recipes import changes, checks, method_options
from kilobatch.launch.recipes.data import prepare_data, with_absolute_paths
from kilobatch.launch.recipes.recipe import Recipe, load_recipe, read_recipe, resolve_recipe, schema
from kilobatch.launch.runs.identity import read_identity
from tests.helpers.begun_runs import SMALL, begun, images

NETWORK = """
raise SystemExit("a recipe's files are read, not run")

def net(width: int = 4):
    ...
"""


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recipe:
    """The recipe of a run with an encoder and a method of its own, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KILOBATCH_CACHE", str(tmp_path / "cache"))
    images("train.npz", 0)
    images("test.npz", 1)
    (tmp_path / "nets.py").write_text(NETWORK)
    write_method("mine", force=False)
    data = [text for text in SMALL if not text.startswith("encoder")]
    names = ["encoder.name=nets.py:net", "encoder.options={width: 3}", "method.name=mine.py:Mine", "method.dim=8"]
    return resolve_recipe("demo", [*data, *names])


def test_a_method_of_ones_own_has_options_as_a_papers(own: Recipe):
    method = own.method.model_dump()
    assert method == {"name": "mine.py:Mine", "temperature": 0.2, "dim": 8}
    with pytest.raises(UserError, match=r"override 'method.temperature=0': method.temperature is 0; it should be grea"):
        read_recipe("demo", ["method.name=mine.py:Mine", "method.temperature=0"])
    with pytest.raises(UserError, match=r"'method' has no key 'tau'"):
        read_recipe("demo", ["method.name=mine.py:Mine", "method.tau=1"])
    described = schema(["mine.py:Mine"])["$defs"]["Mine_options"]["properties"]
    assert described["name"]["const"] == "mine.py:Mine"
    assert described["temperature"]["description"] == "which similarities are divided by"
    assert "Mine_options" not in schema()["$defs"]


def test_paths_become_absolute_and_the_recipe_is_read_back(own: Recipe, tmp_path: Path):
    rooted = with_absolute_paths(own)
    assert (rooted.encoder.name, rooted.method.name) == (f"{tmp_path}/nets.py:net", f"{tmp_path}/mine.py:Mine")
    (tmp_path / "recipe.yaml").write_text(rooted.dump_yaml())
    assert load_recipe(tmp_path / "recipe.yaml")[0] == rooted
    other = f"method.name={tmp_path}/elsewhere/mine.py:Mine"
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.py").write_bytes((tmp_path / "mine.py").read_bytes())
    assert load_recipe(tmp_path / "recipe.yaml", [other])[0].method.model_dump()["dim"] == 8  # its options stay


def test_a_changed_file_is_a_change_of_the_run(own: Recipe, tmp_path: Path):
    run = begun(with_absolute_paths(own))
    recorded = read_identity(run)
    assert recorded is not None and {*recorded.sources} == {"encoder.name", "method.name"}
    recipe = load_recipe(run / "recipe.yaml")[0]
    assert changes.begin_or_compare(run, recipe, prepare_data(recipe)) == frozenset()
    (tmp_path / "nets.py").write_text(NETWORK + "\n# other\n")
    with pytest.raises(UserError, match=r"has changed since it began:\n  file of encoder.name: SHA-256 .*…, now "):
        changes.begin_or_compare(run, recipe, prepare_data(recipe))
    with pytest.raises(UserError, match=r"file of encoder.name: .*put the old values back"):
        changes.refuse_other_images(run, recipe, prepare_data(recipe), {"train": None, "test": None}, [])


def test_a_file_that_lies_elsewhere_is_the_same(own: Recipe, tmp_path: Path):
    run = begun(with_absolute_paths(own))
    (tmp_path / "moved").mkdir()
    (tmp_path / "nets.py").rename(tmp_path / "moved" / "nets.py")
    settings = load_recipe(run / "recipe.yaml")
    with pytest.raises(UserError, match=rf"there is no file {tmp_path}/nets.py, which should hold net; put it back"):
        checks.check(settings[0], 1, settings[1], [])
    moved, _ = load_recipe(run / "recipe.yaml", [f"encoder.name={tmp_path}/moved/nets.py:net"])
    assert changes.recipe_changes(run, moved) == []
    other, _ = load_recipe(run / "recipe.yaml", ["encoder.name=convnet", "encoder.options=null"])
    assert {change.name for change in changes.recipe_changes(run, other)} == {"encoder.name", "encoder.options"}


def test_a_method_whose_file_has_moved_is_refused_with_its_path(own: Recipe, tmp_path: Path):
    run = begun(with_absolute_paths(own))
    (tmp_path / "mine.py").unlink()
    with pytest.raises(
        UserError, match=rf"recipe.yaml line \d+: there is no file {tmp_path}/mine.py, which should hold"
    ):
        load_recipe(run / "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("class Mine:\n    pass\n", "Mine of .*mine2.py is no method: it should derive from Method of kilobatch"),
        ("def Mine():\n    pass\n", "defines no class 'Mine'; it has no class at its top"),
        ("class Mine(\n", r"mine2.py line \d+: not valid Python"),
        (
            "from kilobatch.methods.method import Method\nimport torch\nclass Mine(Method):\n"
            "    def __init__(self, encoder, *, size: int = torch.get_num_threads()):\n        pass\n",
            "mine2.py line 4: a constructor's types and defaults .*'torch' cannot come from torch",
        ),
    ],
)
def test_what_is_no_method(text: str, message: str, tmp_path: Path):
    (tmp_path / "mine2.py").write_text(text)
    with pytest.raises(UserError, match=message):
        method_options.options_of(f"{tmp_path}/mine2.py:Mine")


def test_several_methods_in_a_file_and_one_that_derives_from_a_papers(tmp_path: Path):
    (tmp_path / "two.py").write_text(
        "from kilobatch.methods.papers.simclr import SimCLR\n"
        "class One(SimCLR):\n    views = 3\n"
        "class Two(One):\n    further_groups = True\n"
    )
    one, two = (method_options.declared(f"{tmp_path}/two.py:{name}") for name in ("One", "Two"))
    assert (one.views, one.further_groups, two.views, two.further_groups) == (3, False, 3, True)
    assert one.arguments.keys() == method_options.declared("simclr").arguments.keys()
    assert method_options.method_class(f"{tmp_path}/two.py:Two").__name__ == "Two"


def test_options_of_an_encoder_are_for_networks_of_libraries():
    with pytest.raises(UserError, match="options for convnet: its options are those beside its name"):
        read_recipe("demo", ["encoder.options={drop_path_rate: 0.2}"])
    with pytest.raises(UserError, match="options has pretrained: the encoder has no classifier, loads no weights"):
        read_recipe("demo", ["encoder.name=timm/test_vit", "encoder.options.pretrained=true"])
    recipe, _ = read_recipe("demo", ["encoder.name=timm/test_vit", "encoder.options.drop_path_rate=0.2"])
    assert recipe.encoder.options == {"drop_path_rate": 0.2}
    with pytest.raises(UserError, match=r"'net.py' is not of the form FILE.py:NAME"):
        read_recipe("demo", ["encoder.name=net.py"])
