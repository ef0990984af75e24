"""SIGKILL twenty times, at random moments and during saves, one worker or all: the run ends up the same, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from trainer.checkpoint import newest, open_saved
from trainer.monitor import TIMINGS

KILLS = 20
STEPS = 330  # more than the kills let pass
RECIPE = [
    "demo",
    "data.batch=130",
    "data.views.size=16",
    "data.threads=1",
    "encoder.width=4",
    "optimizer.name=lars",
    "optimizer.lr=0.5",
    "schedule.epochs=30",
    "schedule.warmup_epochs=2",
    "checkpoint.every_steps=3",
    "evaluate.every_epochs=10",
    "evaluate.final=[knn]",
    "run.log_every=1",
    "run.name=drill",
]


def command(*arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "launch", *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def workers_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(launcher.pid).children()


def logged(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_for(condition: Callable[[], bool], launcher: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert launcher.poll() is None, "the run ended by itself before it was killed"
        assert time.monotonic() < deadline, "no progress in 120 s"
        time.sleep(0.002)


def lines_without_timings(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = newest(run / "checkpoints", lambda damage: pytest.fail(damage))
    assert found is not None
    saved = open_saved(found)
    names = [name for name in saved.names() if name.startswith(("method.", "optimizer."))]
    assert len(names) > 40
    return {name: saved.whole(name) for name in names}


def run_to_the_end(launcher: subprocess.Popen[bytes]) -> None:
    assert launcher.wait(timeout=240) == 0


@pytest.mark.timeout(900)
def test_twenty_kills_change_no_bit(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole" / "drill", tmp_path / "killed" / "drill"
    run_to_the_end(command("train", *RECIPE, f"run.folder={whole.parent}", "--workers", "2"))

    chance = random.Random(0)
    start = ["train", *RECIPE, f"run.folder={killed.parent}", "--workers", "2"]
    during_saves = 0
    for kill in range(KILLS):
        launcher = command(*start)
        start = ["resume", str(killed)]
        before = logged(killed)
        # A resume may cut lines off, so progress is a change of the log.
        wait_for(lambda: logged(killed) not in (0, before), launcher)  # noqa: B023
        victims = workers_of(launcher)
        assert len(victims) == 2
        if kill % 2:
            chosen = victims
        else:
            chosen = [chance.choice(victims)]
        time.sleep(chance.uniform(0.0, 0.6))
        if kill % 4 > 1:
            wait_for(lambda: any((killed / "checkpoints").glob(".tmp-step-*")), launcher)
            during_saves += 1
        assert launcher.poll() is None, "the run ended by itself before it was killed"
        for victim in chosen:
            os.kill(victim.pid, signal.SIGKILL)
        assert launcher.wait(timeout=30) == 1, "the launcher reports the death of a worker"
        assert not any(victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE for victim in victims)
    assert during_saves == KILLS // 2
    run_to_the_end(command(*start))

    expected, found = weights(whole), weights(killed)
    assert expected.keys() == found.keys()
    different = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not different
    assert lines_without_timings(whole) == lines_without_timings(killed)
