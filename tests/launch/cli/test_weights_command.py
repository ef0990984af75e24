"""`kilobatch weights`: what it prints of a file, and what it refuses. The lines that it prints start a run."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.launch.worker.pretrained import start_from
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.networks.resnet import ResNet
from kilobatch.trainer.checkpoint.export import export
from tests.launch.conftest import CommandResult
from tests.trainer.checkpoint.test_export import trained

Run = Callable[..., CommandResult]


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def below(prefix: str, state: dict[str, Tensor], more: float = 0) -> dict[str, Tensor]:
    return {prefix + name: x + more for name, x in state.items()}


def started(line: str) -> tuple[Path, EncoderOptions]:
    """The file and the options of a printed `kilobatch train RECIPE …`."""
    words = line.removeprefix("kilobatch train RECIPE ").split()
    assert words != line.split()
    options = resolve_recipe("demo", words).encoder
    assert options.start is not None
    return Path(options.start), options


def test_a_file_with_two_encoders(kilobatch: Run) -> None:
    state = ResNet("resnet18", "cifar").state_dict()
    content = below("module.encoder_k.", state, 1) | below("module.encoder_q.", state)
    torch.save({"state_dict": content | {"module.queue_ptr": torch.zeros(1)}}, "moco.pth.tar")
    done = kilobatch("weights", "moco.pth.tar")
    assert done.code == 0, done.err
    rows = [line for line in done.out.splitlines() if "│" in line]
    assert re.search(r"module\.encoder_q\. +│ +100 │ encoder\.name=resnet18 encoder\.stem=cifar +│ MoCo v1", rows[0])
    assert "module.encoder_k." in rows[1] and "taken only if it is named" in rows[1]
    line, other = done.out.splitlines()[-2:]
    file, options = started(line)
    encoder = build_encoder(options)
    start_from(file, options, encoder)
    assert torch.equal(encoder.state_dict()["conv1.weight"], state["conv1.weight"])
    prefix = other.removeprefix("It takes the first. For another: ")
    file, options = started(f"{line} {prefix}")
    start_from(file, options, encoder)
    assert torch.equal(encoder.state_dict()["conv1.weight"], state["conv1.weight"] + 1)


def test_a_file_that_has_to_be_told_which(kilobatch: Run) -> None:
    state = ConvNet(4, "local").state_dict()
    torch.save({"a": state, "b": below("", state, 1)}, "two.pt")
    line, why = kilobatch("weights", "two.pt").out.splitlines()[-2:]
    assert line.endswith("encoder.name=convnet encoder.width=4 encoder.start_prefix=a/")
    assert why.startswith("encoder.start_prefix has to say which")
    start_from(*started(line), build_encoder(started(line)[1]))


def test_a_network_of_others(kilobatch: Run) -> None:
    save_file({"stem.weight": torch.ones(3, 3), "blocks.0.weight": torch.ones(3)}, "model.safetensors")
    done = kilobatch("weights", "model.safetensors")
    assert done.code == 0 and "none of kilobatch's own" in done.out
    assert "encoder.name=NETWORK\nNETWORK: timm/NAME, torchvision/NAME" in done.out


def test_an_exported_file(kilobatch: Run, tmp_path: Path) -> None:
    trained(tmp_path, EncoderOptions(name="convnet", width=4), steps=(40,))
    export(tmp_path, Path("e.safetensors"), report=pytest.fail)
    first, line = kilobatch("weights", "e.safetensors").out.splitlines()
    assert first.startswith("e.safetensors: encoder of a simclr run of kilobatch, step 40, for")
    assert line == "kilobatch train RECIPE encoder.start=e.safetensors encoder.name=convnet encoder.width=4"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothere.pt", "nothere.pt cannot be read: No such file"),
        (".", "is a folder; name a file. Of a run or a checkpoint the place is known: encoder.start=RUN"),
        ("text.pt", "is no file of torch.save or safetensors, or it is damaged"),
        ("numbers.pt", "holds tensors, but no network's"),
    ],
)
def test_what_is_refused(name: str, said: str, kilobatch: Run) -> None:
    Path("text.pt").write_text("weights")
    torch.save({"mean": torch.zeros(3)}, "numbers.pt")
    refused = kilobatch("weights", name)
    assert refused.code == 2 and said in refused.err and not refused.out
