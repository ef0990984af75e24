"""docs/guides/coming-from.md: every option that it names exists, every value is accepted, and its commands resolve."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch import nn

from kilobatch.launch.cli.reports.options import Option, all_options
from kilobatch.launch.recipes import method_options
from kilobatch.launch.recipes.recipe import Recipe, resolve_recipe
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.networks.resnet import ResNet, torchvision_state_dict
from kilobatch.methods.networks.weights.start import start_encoder
from kilobatch.methods.networks.weights.state_file import read_places
from tests.guides import coming_from_page as page
from tests.guides.coming_from_page import PageRow

ROWS = list(page.rows())
OPTIONS = all_options()
# The recipe in which a section's values are tried; a cell that names methods is tried in a recipe of each.
RECIPES = {
    "What means something else": "moco_v2_imagenet",
    "lightly": "simclr_cifar10_lightly",
    "solo-learn": "simclr_cifar10_solo",
    "VISSL": "simclr_imagenet",
    "MoCo": "moco_v2_imagenet",
    "DINO": "dino_vit_small_imagenet",
    "timm": "simclr_cifar10_lightly",
}
OF_METHOD = {
    "dino": "dino_imagenet",
    "simclr": "simclr_imagenet",
    "moco": "moco_v2_imagenet",
    "moco_v3": "moco_v3_imagenet",
    "instance_discrimination": "instance_discrimination_imagenet",
    "pirl": "pirl_imagenet",
}
# Rows whose number is another one here, as their last cell says.
OTHER_NUMBERS = ("lr.lengths", "strength", "num_layers=2)` | `moco`", "--input-size", "--saveckp_freq")


def known(key: str, method: str | None) -> bool:
    """method: the method that has to have the option; None: any."""
    if not key.startswith("method."):
        listed = OPTIONS[key.partition(".")[0]]
    elif method is not None:
        listed = OPTIONS[method]
    else:
        listed = [option for name in method_options.method_names() for option in OPTIONS[name]]
    return any(o.key == key or (key.startswith(f"{o.key}.") and known_below(o, key, method)) for o in listed)


def known_below(option: Option, key: str, method: str | None) -> bool:
    """Whether the option is a mapping of any keys, or has those of another section in which the key is."""
    other = re.search(r"its options: as ([\w.]+)'s", option.meaning)
    below = other and known(other[1] + key.removeprefix(option.key), method)
    return bool(below) or option.kind.startswith("mapping")


def value_of(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def test_the_page_has_its_tables() -> None:
    assert {row.section for row in ROWS} == set(RECIPES)
    for section, least in {"lightly": 30, "solo-learn": 35, "VISSL": 30, "MoCo": 20, "DINO": 15, "timm": 35}.items():
        assert sum(row.section == section for row in ROWS) >= least, section


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_a_cell_names_options_that_there_are(row: PageRow) -> None:
    assert row.here.startswith("none") or row.options, f"'{row.here}' names no option, and is not 'none'"
    words = [word for word in page.QUOTED.findall(row.here) if word not in row.methods]
    assert len(words) == len(row.options), f"'{row.here}' has more than methods and options"
    for key, _ in row.options:
        if key.startswith("method.") and row.section != "What means something else" and key != "method.name":
            assert row.methods, f"'{row.here}' does not say of which method"
        for method in row.methods or [None]:
            assert known(key, method), f"{method or 'no method'} has no option {key}"


def test_all_other_options_of_the_page_exist() -> None:
    found = page.options_in(page.TEXT)
    assert len(found) > 200
    assert [key for key, _ in found if not known(key, None)] == []


@pytest.mark.parametrize("row", ROWS, ids=[row.id for row in ROWS])
def test_its_values_are_accepted(row: PageRow) -> None:
    given = [(key, text) for key, text in row.options if text is not None]
    changes = [f"{key}={text}" for key, text in given]
    if any(key.startswith("encoder.options.") for key, _ in given):
        changes = ["encoder.name=timm/vit_small_patch16_224", *changes]
    for recipe in [OF_METHOD[method] for method in row.methods] or [RECIPES[row.section]]:
        resolved = resolve_recipe(recipe, changes)
        for key, text in given[-1:] if row.section == "What means something else" else given:
            assert value_of(resolved, key) == page.read_value(text or ""), key


def test_a_value_is_the_other_packages() -> None:
    """A number on their side stands on ours too, so that no row gives another one by mistake."""
    number = re.compile(r"\d+(?:\.\d+)?(?:e-\d+)?")
    compared = 0
    for row in ROWS:
        ours = {float(x) for _, text in row.options if text for x in number.findall(text)}
        theirs = [cell for cell in row.theirs if cell][-1].replace(" (v3)", "")
        values = {float(x) for x in number.findall(re.sub(r"^`-*[\w.-]+[( ]?", "", theirs))}
        if ours and values and not any(part in f"{theirs} | {row.here}" for part in OTHER_NUMBERS):
            assert values <= ours, row.id
            compared += 1
    assert compared > 90


def test_its_commands_resolve() -> None:
    found = page.commands()
    assert len(found) >= 7
    for recipe, *rest in found:
        changes = [word for word in rest if "=" in word and not word.startswith("--")]
        resolved = resolve_recipe(recipe, changes)
        for change in changes:
            key, _, text = change.partition("=")
            assert value_of(resolved, key) == page.read_value(text), change


def test_what_it_says_is_missing_is_missing() -> None:
    missing = "dino" not in method_options.method_names()
    assert missing == ("kilobatch has no DINO yet" in page.TEXT), "write the page's section on DINO anew"


def test_its_views_of_several_sizes(tmp_path: Path) -> None:
    (block,) = page.blocks("yaml")
    (tmp_path / "own.yaml").write_text(f"extends: dino_vit_small_imagenet\n{block}")
    first, second = resolve_recipe(str(tmp_path / "own.yaml"), []).data.groups
    assert (first.count, first.size, second.count, second.size) == (2, 224, 8, 96)
    assert first.second and first.second.blur and first.second.blur.probability == 0.1
    assert isinstance(second, BaseModel) and second.crop and second.crop.scale == (0.05, 0.4)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ResNet]:
    """An exported ResNet-50's tensors, and the encoder."""
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    encoder = build_encoder(EncoderOptions(name="resnet50")).eval()
    assert isinstance(encoder, ResNet)
    save_file(torchvision_state_dict(encoder.state_dict()), folder / "encoder.safetensors")
    return folder, encoder


@pytest.mark.parametrize(
    ("block", "network"), [("torchvision", "network"), ("timm", "network"), ("lightly", "backbone")]
)
def test_ways_out(block: str, network: str, exported: tuple[Path, ResNet], monkeypatch: pytest.MonkeyPatch) -> None:
    reason = f"{block} is not installed: the page's lines for it do not run"
    pytest.importorskip("lightly.models.modules" if block == "lightly" else block, reason=reason)
    folder, encoder = exported
    monkeypatch.chdir(folder)
    code = page.blocks("python")[("torchvision", "timm", "lightly").index(block)]
    assert f"{block}." in code
    names: dict[str, Any] = {}
    exec(compile(code, str(page.PAGE), "exec"), names)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = names[network].eval()(images)
        torch.testing.assert_close(features, encoder(images), rtol=1e-4, atol=1e-5)
        if block == "lightly":
            assert names["projection_head"].eval()(features).shape == (2, 128)


@pytest.mark.parametrize(("file", "package"), [("moco.pth.tar", "MoCo v1 or v2"), ("solo.ckpt", "Barlow")])
def test_prefixes_of_others(
    file: str, package: str, exported: tuple[Path, ResNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What main_lincls.py and main_linear.py do with the names leaves those of torchvision's network."""
    folder, encoder = exported
    monkeypatch.chdir(folder)
    exec(compile(page.blocks("python")[-1], str(page.PAGE), "exec"), {})
    state = torch.load(folder / file, weights_only=True)["state_dict"]
    prefix = "module.encoder_q." if package.startswith("MoCo") else "backbone."
    assert state.keys() == {f"{prefix}{name}" for name in encoder.state_dict()}
    original = load_file(folder / "encoder.safetensors")
    assert all(torch.equal(x, original[name.removeprefix(prefix)]) for name, x in state.items())


def checkpoint(kind: str, network: nn.Module) -> dict[str, Any]:
    """A file with an encoder twice: the network as it was trained, and another one."""
    other = {name: x + 1 for name, x in network.state_dict().items()}
    if kind == "timm":
        return {"state_dict": network.state_dict(), "state_dict_ema": other, "arch": "resnet18", "epoch": 3}
    state = {f"backbone.{name}": x for name, x in network.state_dict().items()}
    state |= {f"backbone_momentum.{name}": x for name, x in other.items()}
    state |= {"projection_head.layers.0.weight": torch.ones(4, 512)}
    return {"state_dict": state, "pytorch-lightning_version": "2.5.0"}


@pytest.mark.parametrize(
    ("kind", "prefix", "further"),
    [
        ("timm", None, 0),
        ("timm", "state_dict_ema/", 1),
        ("lightly", None, 0),
        ("lightly", "backbone_momentum.", 1),
    ],
)
def test_of_two_encoders_the_one_that_the_page_says(
    kind: str, prefix: str | None, further: int, tmp_path: Path
) -> None:
    network, encoder = ResNet("resnet18"), ResNet("resnet18")
    torch.save(checkpoint(kind, network), tmp_path / "a.ckpt")
    assert prefix is None or kind == "lightly" or f"`encoder.start_prefix={prefix}`" in page.TEXT
    start_encoder(encoder, *read_places(tmp_path / "a.ckpt"), 0.9, prefix)
    for name, x in network.state_dict().items():
        if x.is_floating_point():
            assert torch.equal(encoder.state_dict()[name], x + further), name
