"""Pre-training, fine-tuning on few labels and distillation by the real command: runs that were killed and resumed end
bitwise as those that were left alone."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from kilobatch.launch.worker.pretrained import load_method
from tests.helpers.real_runs import (
    TINY,
    command,
    lines_without_timings,
    logged,
    run_to_the_end,
    wait_for,
    weights,
    workers_of,
)

ONE_VIEW = ["data.views.count=1", "data.labels.share=0.05", "evaluate.during=classify"]  # 72 labels
PRETRAIN = [*TINY, "method.name=simclr_v2", "data.batch=130", "schedule.epochs=3", "evaluate.every_epochs=0"]
FINETUNE = [
    *[*TINY, *ONE_VIEW],
    *["method.name=finetune", "data.unlabelled=drop", "data.batch=16", "optimizer.lr=0.2", "schedule.epochs=30"],
    *["evaluate.every_epochs=10", "evaluate.final=[classify,classify_moved]", "checkpoint.every_steps=3"],
]
DISTILL = [
    *[*TINY, *ONE_VIEW],
    *["method.name=distill", "method.alpha=0.5", "encoder.width=2", "data.batch=130", "schedule.epochs=8"],
    "optimizer.lr=6",  # LARS adapts a student's classifier, too, which learns slowly at 0.5
    *["evaluate.every_epochs=4", "evaluate.final=[classify]", "checkpoint.every_steps=3"],
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs pre, fine and small, none of which was interrupted."""
    folder = tmp_path_factory.mktemp("chain")
    run_to_the_end(command("train", *PRETRAIN, f"run.folder={folder}", "run.name=pre", "--workers", "1"))
    run_to_the_end(command("train", *finetune(folder), f"run.folder={folder}", "run.name=fine", "--workers", "1"))
    run_to_the_end(command("train", *distill(folder), f"run.folder={folder}", "run.name=small", "--workers", "2"))
    return folder


def finetune(folder: Path) -> list[str]:
    return [*FINETUNE, f"method.start={folder / 'pre'}"]


def distill(folder: Path) -> list[str]:
    return [*DISTILL, f"method.teacher={folder / 'fine'}"]


def last(run: Path, name: str) -> float:
    return next(line[name] for line in reversed(lines_without_timings(run)) if name in line)


@pytest.mark.timeout(900)
def test_each_stage_learns_and_an_evaluation_needs_no_teacher(chain: Path) -> None:
    fine, small = chain / "fine", chain / "small"
    assert last(fine, "step") == 30 * (72 // 16)  # the labelled images alone
    assert last(small, "step") == 8 * (1437 // 130)  # all of them
    taught, learned = last(fine, "final/classify/top1"), last(small, "final/classify/top1")
    print(f"top-1: fine-tuned {taught:.1%}, distilled {learned:.1%}")
    assert taught > 0.3 and learned > 0.3  # chance is 10 %
    assert last(fine, "classify/top1") == taught != last(fine, "final/classify_moved/top1")

    pinned = json.loads((small / "identity.json").read_text())["references"][str(fine)]
    assert pinned["step"] == last(fine, "step")
    assert sum(p.numel() for p in load_method(str(small)).parameters()) * 2 < sum(
        p.numel() for p in load_method(str(fine)).parameters()
    )
    fine.rename(chain / "away")
    try:
        run_to_the_end(command("eval", str(small), "evaluate.knn.k=3", "--classify", "--knn", "--workers", "1"))
    finally:
        (chain / "away").rename(fine)
    answers = json.loads((small / "evaluations.jsonl").read_text().splitlines()[-1])
    assert answers["classify/top1"] == learned and answers["classify_moved/top5"] > answers["classify_moved/top1"]
    assert answers["options"]["knn"]["k"] == 3 and answers["knn/top1"] > 0.3


@pytest.mark.timeout(900)
def test_fine_tuning_resumes_without_the_run_it_started_from(chain: Path, tmp_path: Path) -> None:
    run = killed(finetune(chain), 1, tmp_path)
    (chain / "pre").rename(chain / "away")
    try:
        run_to_the_end(command("resume", str(run)))
    finally:
        (chain / "away").rename(chain / "pre")
    same_to_the_bit(run, chain / "fine")


@pytest.mark.timeout(900)
def test_distillation_resumes_with_its_teacher(chain: Path, tmp_path: Path) -> None:
    run = killed(distill(chain), 2, tmp_path)
    run_to_the_end(command("resume", str(run)))
    same_to_the_bit(run, chain / "small")


def killed(recipe: list[str], workers: int, folder: Path) -> Path:
    """A run whose last worker is killed in the middle of an epoch, after a checkpoint."""
    run = folder / "drill"
    launcher = command("train", *recipe, f"run.folder={folder}", "run.name=drill", "--workers", str(workers))
    wait_for(lambda: logged(run) >= 7, launcher)
    wait_for(lambda: any((run / "checkpoints").glob("step-*")), launcher)
    os.kill(workers_of(launcher)[-1].pid, signal.SIGKILL)
    launcher.ends(1, within=60)
    return run


def same_to_the_bit(run: Path, whole: Path) -> None:
    expected, found = weights(whole), weights(run)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert lines_without_timings(whole) == lines_without_timings(run)
