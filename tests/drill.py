"""Real runs of a tiny recipe by the real command, for drills that stop them and look at what they leave."""

import json
import os
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

TINY = [
    "demo",
    "data.views.size=16",
    "data.threads=1",
    "encoder.width=4",
    "optimizer.name=lars",
    "optimizer.lr=0.5",
    "schedule.warmup_epochs=2",
    "evaluate.every_epochs=10",
    "evaluate.final=[knn]",
    "run.log_every=1",
]
RECIPE = [*TINY, "data.batch=130", "checkpoint.every_steps=3", "run.name=drill"]


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
    memories = [name for name in saved.own_names() if name.startswith("method.")]
    of_ranks = {f"{name} of rank {rank}": saved.own(name, rank) for name in memories for rank in range(saved.world)}
    return {name: saved.whole(name) for name in names} | of_ranks


def run_to_the_end(launcher: subprocess.Popen[bytes]) -> None:
    assert launcher.wait(timeout=240) == 0
