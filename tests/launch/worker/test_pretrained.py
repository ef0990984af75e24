"""Methods that other runs have trained: loaded by run, checkpoint and exported file; pinned for a run that resumes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes import references
from kilobatch.launch.runs.identity import Identity, ImagesIdentity, ReferenceIdentity, read_references, write_identity
from kilobatch.launch.worker import pretrained
from kilobatch.launch.worker.pretrained import EncoderAlone, PinnedReferences, load_method
from kilobatch.methods.method import Method
from kilobatch.trainer.checkpoint.export import export
from tests.helpers.method_runs import make_run, same

SIMCLR = ["encoder.width=2", "method.name=simclr_v2"]
QUEUE = [*SIMCLR, "method.queue.length=8"]
FINETUNE = ["encoder.width=2", "method.name=finetune", "data.views.count=1"]


def frozen(method: Method) -> bool:
    training = any(module.training for module in method.modules())
    return not training and not any(parameter.requires_grad for parameter in method.parameters())


@pytest.mark.parametrize("changes", [SIMCLR, QUEUE, FINETUNE], ids=["simclr_v2", "with a queue", "finetune"])
def test_runs_checkpoints_and_whole_files(changes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "runs" / "other"
    run.parent.mkdir()
    earlier = make_run(run, changes, 3)
    last = make_run(run, changes, 4)
    out = tmp_path / "whole.safetensors"
    export(run, out, whole=True, report=pytest.fail)
    monkeypatch.chdir(tmp_path)
    state = torch.get_rng_state()
    for where in ("other", "runs/other", str(run / "checkpoints" / "step-00000004"), str(out)):
        found = load_method(where)
        assert same(found, last) and frozen(found), where
    assert torch.equal(torch.get_rng_state(), state)  # a run's random numbers do not depend on what it loads
    assert same(load_method(str(run / "checkpoints" / "step-00000003")), earlier)
    assert references.recipe_of(str(out)) == references.recipe_of("other")


@pytest.mark.parametrize(
    "encoder",
    [
        "encoder.width=2",
        "encoder.name=resnet18",
        "encoder.name=timm/test_vit",
        pytest.param("encoder.name=vit_small", marks=pytest.mark.slow),
    ],
)
def test_a_file_with_the_encoder_alone(encoder: str, tmp_path: Path) -> None:
    method = make_run(tmp_path / "run", [encoder], 1)
    out = tmp_path / "encoder.safetensors"
    export(tmp_path / "run", out, report=pytest.fail)
    found = load_method(str(out))
    assert isinstance(found, EncoderAlone) and frozen(found) and not hasattr(found, "head")
    theirs = method.encoder.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in found.encoder.state_dict().items())


def test_damaged_or_absent_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, SIMCLR, 1)
    out = tmp_path / "whole.safetensors"
    export(run, out, whole=True, report=pytest.fail)
    metadata, tensors = references.metadata_of(out), load_file(out)
    del metadata["sha256"]  # as another program writes it

    def refused(where: Path, words: str) -> None:
        with pytest.raises(UserError, match=words):
            load_method(str(where))

    name = next(name for name, tensor in tensors.items() if tensor.ndim == 4)
    held = tensors.pop(name)
    save_file(tensors, out, metadata)
    refused(out, f"lacks 1 tensors of its recipe's method, such as '{name}'")
    save_file({**tensors, name: held, "method.extra": held.clone()}, out, metadata)
    refused(out, "holds 1 tensors that its recipe's method has not, such as 'method.extra'")
    save_file({**tensors, name: torch.zeros(99, 99)}, out, metadata)
    refused(out, "does not hold what its recipe says")
    save_file({**tensors, name: held}, out, {})
    refused(out, "says nothing of its recipe")
    out.write_bytes(out.read_bytes()[:-1])
    refused(out, "no whole .safetensors file")

    step = run / "checkpoints" / "step-00000001"
    shard = next(path for path in step.iterdir() if path.suffix == ".safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + bytes([shard.read_bytes()[-1] ^ 1]))
    refused(step, "the checksum of .* does not match")
    refused(run, "no whole checkpoint")
    shutil.rmtree(step)
    refused(run, "has no checkpoint yet")
    refused(tmp_path / "nowhere", "there is no run")


def test_a_resumed_run_loads_what_it_began_with(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    begin(run)
    first = make_run(other, FINETUNE, 5)
    assert same(references_of(run).load(str(other)), first)
    pinned = read_references(run)[str(other)]
    assert (pinned.path, pinned.step) == (other / "checkpoints" / "step-00000005", 5) and len(pinned.sha256) == 64
    assert pinned.classes == [f"class {k}" for k in range(10)]

    make_run(other, FINETUNE, 6)  # it has been trained on meanwhile
    assert same(references_of(run).load(str(other)), first)
    shutil.copytree(other / "checkpoints" / "step-00000005", tmp_path / "kept")
    make_run(other, FINETUNE, 5)  # and now another run has written a step of that number
    with pytest.raises(UserError, match=r"another content than when this run began with it .* at step 5"):
        references_of(run).load(str(other))
    shutil.rmtree(other / "checkpoints" / "step-00000005")
    with pytest.raises(UserError, match=r"step-00000005, which this run began with .* is not there any more"):
        references_of(run).load(str(other))
    shutil.copytree(tmp_path / "kept", other / "checkpoints" / "step-00000005")
    assert same(references_of(run).load(str(other)), first)
    (run / "identity.json").write_text("{")
    with pytest.raises(UserError, match="identity.json is damaged"):
        references_of(run).load(str(other))


def test_a_run_of_an_earlier_version_loads_what_it_began_with(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    first = make_run(other, FINETUNE, 5)
    pinned = pretrained.resolve_reference(str(other)).model_dump(mode="json", exclude={"classes"})
    (run / "trained.json").write_text(json.dumps({str(other): pinned}))
    make_run(other, FINETUNE, 6)
    assert references.begun(run)
    begin(run)
    assert same(references_of(run).load(str(other)), first)


def begin(run: Path) -> None:
    images = ImagesIdentity(sha256="0", samples=1, classes=[])
    write_identity(run, Identity(recorded="", step=0, train=images, data_sha256="0", test=None, recipe={}, versions={}))


def references_of(run: Path, check: Callable[[str, ReferenceIdentity], None] = lambda where, found: None):
    return PinnedReferences(run, check)
