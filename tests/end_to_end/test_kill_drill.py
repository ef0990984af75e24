"""Runs whose workers are killed at random moments and during saves end bitwise as a run that was left alone."""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from kilobatch.launch.cli.reports.new_method import write_method
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

MEMORY = ["method.name=simclr_v2", "method.queue.length=301", "method.queue.placement=sharded", "method.momentum=0.9"]
NETWORK = """
from torch import nn

def net(width):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout2d(0.2), nn.Conv2d(width, width, 3, 2)
    )
"""
QUEUE = ["method.name=moco", "method.queue.length=301", "method.queue.placement=sharded", "method.momentum=0.9"]
WARMUP = "method.warmup_epochs=2"
CLUSTERS = ["method.name=pcl", "method.clusters=[10,20]", "method.negatives=5", WARMUP, *QUEUE[1:]]
HIERARCHY = ["method.name=hcsc", "method.clusters=[20,10,4]", WARMUP, *QUEUE[1:]]
BANK = [
    "method.name=instance_discrimination",
    "method.form=nce",
    "method.noise=100",
    "data.views.count=1",
    "engine.zero=2",
]

BYOL = ["method.name=byol", "method.momentum=0.9", "method.dim=16", "method.hidden=32"]
SWAV = ["method.name=swav", "method.prototypes=20", "method.queue={length: 390, placement: sharded}"]
SWAV += ["method.queue_epoch=1", "method.freeze_epochs=1"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_kills_amid_k_means_change_no_bit(tmp_path: Path) -> None:
    """Redos make it take seconds. The first kill is before the first clusters, the second amid an epoch's new ones."""
    changes = [*CLUSTERS, "method.redos=60", "schedule.epochs=4", "checkpoint.every_steps=5"]
    whole, killed = tmp_path / "whole" / "drill", tmp_path / "killed" / "drill"
    recipe = [*RECIPE, *changes]
    run_to_the_end(command("train", *recipe, f"run.folder={whole.parent}", "--workers", "2"))
    start = ["train", *recipe, f"run.folder={killed.parent}", "--workers", "2"]
    for steps in (22, 33):  # 11 an epoch
        launcher = command(*start)
        start = ["resume", str(killed)]
        wait_for(lambda: logged(killed) == steps and "k-means of" in launcher.output(), launcher)  # noqa: B023
        for worker in workers_of(launcher):
            os.kill(worker.pid, signal.SIGKILL)
        launcher.ends(1, within=60)
        assert logged(killed) == steps, "it was killed before the epoch's first step"
    run_to_the_end(command(*start))
    same_end(whole, killed)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("method", "kills"),
    [
        (MEMORY, range(4)),
        (BANK, range(1, 3)),
        *(pytest.param(method, range(1, 3), marks=pytest.mark.slow) for method in (QUEUE, BYOL, SWAV, HIERARCHY)),
        pytest.param(CLUSTERS, range(1, 5), marks=pytest.mark.slow),
    ],
    ids=["simclr_v2", "instance_discrimination", "moco", "byol", "swav", "hcsc", "pcl"],
)
def test_a_few_kills_change_no_bit(method: list[str], kills: range, tmp_path: Path) -> None:
    drill([*RECIPE, *method, "schedule.epochs=8"], kills, tmp_path)  # 88 steps: more than are made between the kills


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    drill([*RECIPE, "schedule.epochs=30"], range(20), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("encoder", "options"),
    [
        ("timm/regnety_008", "null"),
        ("timm/convnext_atto", "{drop_path_rate: 0.2}"),
        ("timm/vit_tiny_patch16_224", "{img_size: 32, proj_drop_rate: 0.1}"),
        ("nets.py:net", "{width: 8}"),
    ],
)
def test_kills_with_other_backbones_and_a_method_of_ones_own(
    encoder: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETWORK)
    write_method("mine", force=False)
    changes = [f"encoder.name={encoder}", f"encoder.options={options}", "encoder.width=null", "data.views.size=32"]
    changes += ["method.name=mine.py:Mine", "schedule.epochs=4", "optimizer.name=adamw", "optimizer.lr=0.001"]
    drill([*RECIPE, *changes], range(1, 3), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "method",
    [
        ["seed", "method.dim=512", "method.queue={length: 301, placement: sharded}"],
        ["distill", "method.alpha=0.7"],
    ],
    ids=lambda method: method[0],
)
def test_kills_of_students_of_a_timm_network_change_no_bit(method: list[str], tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    file = tmp_path / "teacher.safetensors"
    save_file(timm.create_model("resnet18", num_classes=10).state_dict(), file)
    teacher = [f"method.teacher={file}", "method.teacher_network=timm/resnet18", "data.views.count=1"]
    name, *options = method
    last = "evaluate.final=[classify]" if name == "distill" else "evaluate.final=[knn]"
    changes = [f"method.name={name}", *options, *teacher, "schedule.epochs=4", last]
    drill([*RECIPE, *changes], range(1, 3), tmp_path)


def drill(recipe: list[str], kills: range, folder: Path) -> None:
    """Kills a run once for each number in `kills`, and compares its end with that of a run that was left alone.

    Odd numbers kill both workers, even ones one of them; of four in a row, the last two kill during a save.
    """
    whole, killed = folder / "whole" / "drill", folder / "killed" / "drill"
    run_to_the_end(command("train", *recipe, f"run.folder={whole.parent}", "--workers", "2"))

    chance = random.Random(0)
    start = ["train", *recipe, f"run.folder={killed.parent}", "--workers", "2"]
    during_saves = 0
    for kill in kills:
        launcher = command(*start)
        start = ["resume", str(killed)]
        before = logged(killed)
        # A resume may remove lines, so that progress is any change of the log.
        wait_for(lambda: logged(killed) not in (0, before), launcher)  # noqa: B023
        workers = workers_of(launcher)
        assert len(workers) == 2
        killed_now = workers if kill % 2 else [chance.choice(workers)]
        time.sleep(chance.uniform(0.0, 0.6))
        if kill % 4 > 1:
            wait_for(lambda: any((killed / "checkpoints").glob(".tmp-step-*")), launcher)
            during_saves += 1
        assert launcher.running(), f"the run ended by itself before it was killed\n{launcher.last_output()}"
        for worker in killed_now:
            os.kill(worker.pid, signal.SIGKILL)
        launcher.ends(1, within=60)  # the launcher reports the death of a worker
        assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)
    assert during_saves == len(kills) // 2
    run_to_the_end(command(*start))
    same_end(whole, killed)


def same_end(whole: Path, killed: Path) -> None:
    """Asserts that two runs have the same weights, memories and logged values to the bit."""
    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different
    assert lines_without_timings(whole) == lines_without_timings(killed)
