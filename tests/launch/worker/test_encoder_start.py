"""Trainings that start with the weights of a run or of another package's file; resumed without them; refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kilobatch.data.errors import UserError
from kilobatch.launch.pipelines.stages import PipelineRequest, plan_pipeline
from kilobatch.launch.planning.fake_step import StepLayout, run_fake_step
from kilobatch.launch.recipes import checks
from kilobatch.launch.recipes.data import with_absolute_paths
from kilobatch.launch.recipes.recipe import read_recipe, resolve_recipe
from kilobatch.launch.runs.identity import read_references
from kilobatch.launch.worker.pretrained import load_foreign
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.resnet import ResNet
from kilobatch.trainer.checkpoint.export import export
from tests.helpers.in_process_runs import copy_of, kilobatch, same_bits, stop_at, tiny_training, weights
from tests.helpers.method_runs import make_run
from tests.helpers.process_groups import run_ranks

# The momentum encoder never moves: what it begins with shows at the end.
MOCO = ("method.name=moco", "method.momentum=1.0", "method.queue.length=8", "schedule.epochs=2")


def scenarios(folder: Path) -> dict[str, Any]:
    source = make_run(folder / "source", ["encoder.width=2"], 3)
    export(folder / "source", folder / "e.safetensors", report=pytest.fail)
    state = {f"module.encoder_q.{name}": x for name, x in source.encoder.state_dict().items()}
    torch.save({"state_dict": state}, folder / "moco.pth.tar")
    torch.save({"state_dict": {"x": torch.ones(2)}}, folder / "other.pth")
    ends = {
        name: tiny_training(folder / f"of-{name}", *MOCO, f"encoder.start={folder}/{name}")
        for name in ("source", "e.safetensors", "moco.pth.tar", "other.pth")
    }
    run = folder / "of-source" / "r"
    resumed = copy_of(run, folder / "resumed")
    stop_at(resumed, 2)
    shutil.rmtree(folder / "source")  # what was trained on is in the checkpoint
    again = kilobatch("resume", str(resumed))
    trained, whole = weights(run), source.encoder.state_dict()["convs.5.weight"]
    kept = [x for name, x in trained.items() if name.startswith("method.momentum_encoder.") and "convs.5" in name]
    others = [weights(folder / f"of-{name}" / "r") for name in ("e.safetensors", "moco.pth.tar")]
    return {
        "codes": {name: end.code for name, end in ends.items()},
        "printed": {name: end.printed for name, end in ends.items()},
        "kept": [torch.equal(x, whole) for x in kept],
        "moved": not torch.equal(trained["method.encoder.convs.5.weight"], whole),
        "recorded": read_references(run)[f"{folder}/source"],
        "resumed": (again.code, again.printed, same_bits(weights(resumed), trained)),
        "same": [same_bits(other, trained) for other in others],
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(1, scenarios, tmp_path_factory.mktemp("runs"), timeout=500.0)[0]


def test_a_run_starts_with_the_weights_before_they_are_copied(found: dict[str, Any]) -> None:
    assert found["codes"]["source"] == 0, found["printed"]["source"]
    assert ": 30 tensors loaded, 100 % of the encoder's parameters; left 0; missing 0" in found["printed"]["source"]
    assert found["kept"] == [True] and found["moved"]


def test_what_was_loaded_is_recorded_and_not_loaded_again(found: dict[str, Any]) -> None:
    recorded = found["recorded"]
    assert recorded.path.name == "step-00000003" and len(recorded.sha256) == 64
    loaded = recorded.loaded
    assert (loaded.package, loaded.tensors, loaded.share, loaded.missing) == ("kilobatch", 30, 1, [])
    code, printed, same = found["resumed"]
    assert (code, same) == (0, True), printed


def test_an_export_and_the_file_of_another_package_start_alike(found: dict[str, Any]) -> None:
    assert found["same"] == [True, True]
    assert "MoCo v1 or v2, at state_dict/module.encoder_q.: 30 tensors loaded" in found["printed"]["moco.pth.tar"]
    assert found["codes"]["other.pth"] != 0 and "other.pth': it holds 1 tensors" in found["printed"]["other.pth"]


def test_starting_weights_are_checked_before_a_run_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "source", [], 3)

    def refused(words: str, *changes: str) -> None:
        recipe, settings = read_recipe("demo", list(changes))
        with pytest.raises(UserError, match=words):
            checks.check(recipe, 2, settings)

    refused(r"override 'encoder.start=gone': encoder.start 'gone': there is no run 'gone'", "encoder.start=gone")
    refused("has another encoder: encoder.width 16 there, 8 here", "encoder.start=source", "encoder.width=8")
    tuned = ("method.name=finetune", "data.views.count=1", "evaluate.during=classify", "method.start=source")
    refused("both give the encoder its weights; use one", *tuned, "encoder.start=source")
    (tmp_path / "w.pth").write_bytes(b"PK")
    recipe, settings = read_recipe("demo", ["encoder.start=w.pth"])
    checks.check(recipe, 2, settings)  # what it holds is seen when it is loaded
    assert with_absolute_paths(recipe).encoder.start == str(tmp_path / "w.pth")
    assert with_absolute_paths(resolve_recipe("demo", ["encoder.start=source"])).encoder.start == str(
        tmp_path / "source"
    )


def test_teachers_of_other_packages_are_found_by_their_tensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks = {"resnet18": ResNet("resnet18", "cifar"), "convnet": ConvNet(3)}
    images = torch.randn(2, 3, 32, 32)
    for name, network in networks.items():
        state = {f"backbone.{key}": x for key, x in network.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / f"{name}.pth")
        taught = load_foreign(tmp_path / f"{name}.pth", None)
        assert not taught.classifies and torch.equal(taught.represent(images), network.eval()(images)), name
    fine = torch.nn.Linear(24, 5)
    state = networks["convnet"].state_dict() | {f"fc.{key}": x for key, x in fine.state_dict().items()}
    torch.save(state, tmp_path / "fine.pth")
    taught = load_foreign(tmp_path / "fine.pth", None)
    assert (taught.classifies, taught.classes) == (True, 5)
    torch.testing.assert_close(taught.logits(images), fine(networks["convnet"](images)))
    assert not any(p.requires_grad for p in taught.parameters())
    torch.save({f"blocks.{key}": x for key, x in fine.state_dict().items()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth: it holds none of kilobatch's own .*method.teacher_network="):
        load_foreign(tmp_path / "x.pth", None)


def test_a_teacher_of_another_package_is_planned(tmp_path: Path) -> None:
    torch.save(ConvNet(3).state_dict(), tmp_path / "t.pth")
    held = []
    for further in ("[]", f"[{tmp_path}/t.pth]"):
        dim = 24 if further == "[]" else 48
        changes = [f"method.teacher={tmp_path}/t.pth", f"method.dim={dim}", f"method.further_teachers={further}"]
        recipe, settings = read_recipe("seed_digits", changes)
        checks.check(recipe, 2, settings)
        held.append(run_fake_step(recipe, StepLayout(2, 119, 1), 1437, 10).held["teacher"])
    assert held[0] == sum(x.numel() * x.element_size() for x in [*ConvNet(3).parameters(), *ConvNet(3).buffers()])
    assert held[1] == 2 * held[0]


def test_later_stages_of_a_pipeline_do_not_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(b"PK")
    request = PipelineRequest("simclr_v2_digits", ["pretrain.encoder.start=w.pth", "pretrain.encoder.width=8"])
    first, second, _ = (stage.recipe.encoder for stage in plan_pipeline(request, None).stages)
    assert first.start == str(tmp_path / "w.pth") and (second.start, second.width) == (None, 8)
