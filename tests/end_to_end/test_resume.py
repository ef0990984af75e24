"""A run that is asked to stop saves and ends. Resumed on as many workers it goes on bitwise the same; on another number
of workers, with the same batches."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from kilobatch.launch.runs import run_folder
from kilobatch.launch.runs.final_evaluation import read_final_evaluation
from kilobatch.launch.runs.identity import read_identity
from kilobatch.trainer.checkpoint.description import list_checkpoints, read_description
from tests.helpers.real_runs import (
    RECIPE,
    command,
    lines_without_timings,
    logged,
    run_to_the_end,
    wait_for,
    weights,
    workers_of,
)

SHORT = [
    *RECIPE,
    "schedule.epochs=6",
    "checkpoint.every_steps=1000",
]  # 66 steps, and no checkpoint except at the signal


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run_to_the_end(command("train", *SHORT, f"run.folder={folder}", "--workers", "2"))
    return folder / "drill"


def stopped(folder: Path, after: int = 5) -> Path:
    run = folder / "drill"
    launcher = command("train", *SHORT, f"run.folder={folder}", "--workers", "2")
    wait_for(lambda: logged(run) >= after, launcher)
    launcher.send_signal(signal.SIGTERM)
    launcher.ends(130, within=60)
    return run


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in lines_without_timings(run) if "train/loss" in line]


def test_resumes_bitwise(whole: Path, tmp_path: Path) -> None:
    run = stopped(tmp_path)
    assert logged(run) < logged(whole)
    run_to_the_end(command("resume", str(run)))
    expected, found = weights(whole), weights(run)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert lines_without_timings(whole) == lines_without_timings(run)


def test_resumes_with_the_same_batches_on_another_number_of_workers(whole: Path, tmp_path: Path) -> None:
    run = stopped(tmp_path)
    step = logged(run)
    run_to_the_end(command("resume", str(run), "--workers", "1"))
    expected, found = (
        [line["train/loss"] for line in lines_without_timings(r) if "train/loss" in line] for r in (whole, run)
    )
    assert len(expected) == len(found)
    # The first step has the same weights and the same images; another batch of them differs in the second digit.
    assert found[step] == pytest.approx(expected[step], rel=1e-5)
    assert found[:step] == expected[:step]


def test_fewer_epochs_end_at_once_and_more_go_on(tmp_path: Path) -> None:
    """A signal at the start is heeded although no step is left; a finished run then gets more epochs."""
    run = stopped(tmp_path, after=12)  # of 11 steps an epoch
    (step,) = list_checkpoints(run / "checkpoints")
    fewer = command("resume", str(run), "schedule.epochs=1", "schedule.warmup_epochs=0")
    wait_for(lambda: len(workers_of(fewer)) == 2, fewer)
    fewer.send_signal(signal.SIGTERM)
    fewer.ends(130, within=60)
    assert run_folder.read_state(run).status == "interrupted" and not (run / "evaluation.json").exists()

    ended = command("resume", str(run))
    run_to_the_end(ended)
    printed = ended.output()
    assert f"is of step {step} of 11, past the end of schedule.epochs=1: no step is left to train" in printed
    assert "k-NN top-1" in printed and [*list_checkpoints(run / "checkpoints")] == [step]

    command("resume", str(run)).ends(2, within=60)
    more = command("resume", str(run), "schedule.epochs=2")
    run_to_the_end(more)
    assert f"cosine over 2 instead of 1 epochs: the learning rate at step {step} goes from 0 to " in more.output()
    assert max(list_checkpoints(run / "checkpoints")) == 22
    record, former = read_final_evaluation(run), (run / f"evaluation-step-{step:08d}.json")
    assert record is not None and record.step == 22 and former.is_file()


def test_other_images_and_options_only_if_they_are_meant(tmp_path: Path) -> None:
    """The checkpoint from which it goes on is of the old ones."""
    write_photos(tmp_path, seed=0)
    photos = [f"data.{split}=npz:{tmp_path}/photos.npz" for split in ("train", "test")]
    tiny = ["data.batch=8", "data.views.size=8", "schedule.epochs=3", "schedule.warmup_epochs=0", "evaluate.final=[]"]
    small = [*RECIPE, *photos, *tiny, "checkpoint.every_steps=2", "checkpoint.keep_last=9", f"run.folder={tmp_path}"]
    run_to_the_end(command("train", *small, "--workers", "1"))
    run = tmp_path / "drill"
    described = read_description(run / "checkpoints" / "step-00000006")["meta"]
    assert described["class_names"] == ["bird", "cat"]
    assert described["input"] == {
        "size": 8, "mean": [0.5] * 3, "std": [0.5] * 3, "central_fraction": 0, "interpolation": "bilinear",
    }  # fmt: skip

    for step, path in list_checkpoints(run / "checkpoints").items():
        if step > 2:
            shutil.rmtree(path)
    run_folder.set_status(run, "interrupted", 1)
    write_photos(tmp_path, seed=1)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.5", "lr: 0.4"))
    command("resume", str(run)).ends(2, within=60)
    run_to_the_end(command("resume", str(run), "--accept-changes"))
    recorded = read_identity(run)
    assert recorded is not None and [entry.step for entry in recorded.accepted] == [2]
    names = [change.name for change in recorded.accepted[0].changes]
    assert names == ["optimizer.lr", "images of data.train", "images of data.test"]
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 6


def write_photos(folder: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 8, 8, 3), np.uint8)
    np.savez(folder / "photos.npz", images=pixels, labels=np.arange(16) % 2, class_names=["bird", "cat"])
