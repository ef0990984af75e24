"""A run that is asked to stop saves and ends. Resumed on as many workers it goes on bitwise the same; on another number
of workers, with the same batches."""

import signal
from pathlib import Path

import pytest
import torch

from tests.helpers.real_runs import RECIPE, command, lines_without_timings, logged, run_to_the_end, wait_for, weights

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


def stopped(folder: Path) -> Path:
    run = folder / "drill"
    launcher = command("train", *SHORT, f"run.folder={folder}", "--workers", "2")
    wait_for(lambda: logged(run) >= 5, launcher)
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
