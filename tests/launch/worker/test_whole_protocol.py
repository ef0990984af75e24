"""A method with every hook of the protocol in whole runs: trained, evaluated, stopped and resumed, exported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from kilobatch.methods.networks.convnet import ConvNet
from tests.helpers.in_process_runs import TINY, Ended, copy_of, kilobatch, same_bits, stop_at, weights
from tests.helpers.own_cache import own_cache
from tests.helpers.paper_files import EVERYTHING, add_paper
from tests.helpers.process_groups import run_ranks

VIEWS = "data.views=[{count: 2, size: 16, blur: null}, {count: 3, size: 8, blur: null}]"
CHANGES = ["method.name=everything", VIEWS, "encoder.norm=local", "engine.chunks=2", "optimizer.name=adamw"]


def write_data(folder: Path, *missing: str) -> None:
    for seed, name in enumerate(("train", "test")):
        random = np.random.default_rng(seed)
        arrays: dict[str, Any] = {
            "images": random.integers(0, 256, (16, 16, 16, 3), np.uint8),
            "labels": np.arange(16) % 2,
        }
        if name not in missing:
            arrays["tokens"] = random.integers(0, 50, (16, 4))
        np.savez(folder / f"{name}.npz", **arrays)


def train(folder: Path, *changes: str, missing: str = "") -> Ended:
    folder.mkdir()
    write_data(folder, missing)
    data = [f"data.train=npz:{folder}/train.npz", f"data.test=npz:{folder}/test.npz"]
    tiny = [change for change in TINY if not change.startswith("data.views")]
    paths = ["run.name=r", f"run.folder={folder}", "--workers", "1"]
    return kilobatch("train", "demo", *tiny, *data, *CHANGES, *paths, *changes)


def scenarios(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("KILOBATCH_CACHE", own_cache(folder / "cache"))
        add_paper(patched, folder / "papers", "everything", EVERYTHING)
        found["whole"] = train(folder / "whole")
        run = folder / "whole" / "r"
        for step in (1, 2, 3):  # within an epoch, where one begins, and in the first step of the late group
            stopped = copy_of(run, folder / f"stopped-{step}")
            stop_at(stopped, step)
            found[f"stopped at {step}"] = kilobatch("resume", str(stopped)), same_bits(weights(stopped), weights(run))
        stop_at(copy_of(run, folder / "late"), 3)
        found["late"] = kilobatch("resume", str(folder / "late" / "r"), "method.late=2")
        found["export"] = kilobatch("export", str(run), str(folder / "kept.safetensors"))
        with safe_open(folder / "kept.safetensors", "pt") as file:
            kept = {f"method.teacher.network.{name}": file.get_tensor(name) for name in [*file.keys()]}
        found["kept"] = sorted(kept), same_bits(kept, {name: weights(run)[name] for name in kept})
        found["without"] = train(folder / "without", missing="test")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(1, scenarios, tmp_path_factory.mktemp("runs"), timeout=400.0)[0]


def test_it_trains_and_is_evaluated(found: dict[str, Any]) -> None:
    assert found["whole"].code == 0, found["whole"].printed
    assert "k-NN top-1" in found["whole"].printed


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resume_ends_with_the_same_bits(found: dict[str, Any], step: int) -> None:
    ended, same = found[f"stopped at {step}"]
    assert ended.code == 0 and same, ended.printed


def test_a_late_group_is_not_to_wait_again(found: dict[str, Any]) -> None:
    assert found["late"].code == 2 and not found["late"].starts
    assert "last.weight has been trained since epoch 1, and would be from epoch 2 on" in found["late"].printed


def test_what_is_exported_is_the_teacher(found: dict[str, Any]) -> None:
    assert found["export"].code == 0, found["export"].printed
    names, same = found["kept"]
    assert names == sorted(f"method.teacher.network.{name}" for name in ConvNet(2, "local").state_dict()) and same


def test_images_without_the_field_are_refused_before_training(found: dict[str, Any]) -> None:
    ended = found["without"]
    assert ended.code == 2 and "represents a sample by its tokens too, and data.test 'npz:" in ended.printed
