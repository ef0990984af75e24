"""Damage at random places of exported files: a run that starts from one is refused, or gets what was exported.

The seed is stated. safetensors itself takes a changed bit of a tensor for another number.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes import checks
from kilobatch.launch.recipes.recipe import read_recipe
from kilobatch.launch.recipes.references import metadata_of
from kilobatch.launch.worker.pretrained import load_method
from kilobatch.methods.method import Method
from kilobatch.trainer.checkpoint.export import export
from kilobatch.trainer.checkpoint.exported_file import check_seal
from tests.helpers import damage
from tests.helpers.method_runs import make_run, same

SEED = 13


@pytest.fixture(scope="module", params=[False, True], ids=["encoder", "whole"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    make_run(folder / "run", ["encoder.width=2", "method.name=finetune", "data.views.count=1"], 4)
    export(folder / "run", folder / "file.safetensors", whole=request.param, report=pytest.fail)
    return folder / "file.safetensors"


def outcome(read: Callable[[], Method | None]) -> Method | None | str:
    """What it gives, or the message of its refusal."""
    try:
        return read()
    except UserError as error:
        return str(error)


def check(recipe_name: str, overrides: list[str]) -> None:
    recipe, settings = read_recipe(recipe_name, overrides)
    checks.check(recipe, 1, settings)


def test_a_damaged_file_is_refused_by_name(exported: Path, tmp_path: Path):
    right, random, file = load_method(str(exported)), np.random.default_rng(SEED), tmp_path / "file.safetensors"
    header = int.from_bytes(exported.read_bytes()[:8], "little")
    start = [f"method={{name: finetune, start: {file}}}", "encoder.width=2", "data.views.count=1", "evaluate.final=[]"]
    refused = {"load": 0, "check": 0}
    contents = [content for _, content in damage.byte_damages(exported.read_bytes(), random, 12)]
    for content in damage.byte_damages(exported.read_bytes()[: 8 + header], random, 8):  # else most hit the tensors
        contents.append(content[1] + exported.read_bytes()[8 + header :])
    for content in [*contents, *damage.OTHER_FILES.values()]:
        file.write_bytes(content)
        loaded = outcome(lambda: load_method(str(file)))
        if isinstance(loaded, Method):
            assert same(loaded, right)
        else:
            assert loaded and str(file) in loaded and "\n" not in loaded and len(loaded) < 1000
            refused["load"] += 1
        checked = outcome(lambda: check("demo", start))
        assert isinstance(loaded, Method) == (checked is None)
        if checked is not None:
            assert isinstance(checked, str) and "method.start" in checked and str(file) in checked
            refused["check"] += 1
    assert refused["load"] == refused["check"] > 80


def test_the_file_of_an_earlier_version_has_no_checksum(exported: Path, tmp_path: Path):
    metadata, old = metadata_of(exported), tmp_path / "old.safetensors"
    assert len(metadata["sha256"]) == 64
    save_file(load_file(exported), old, {name: text for name, text in metadata.items() if name != "sha256"})
    check_seal(old)
    assert same(load_method(str(old)), load_method(str(exported)))
    save_file(load_file(exported), old, metadata | {"step": "5"})
    with pytest.raises(UserError, match="old.safetensors is damaged: its checksum does not match its content; export"):
        load_method(str(old))
