"""Runs of a tiny recipe by the real command, for tests that stop or kill them and check what is left."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil
import pytest
import torch

from kilobatch.trainer.checkpoint.reader import newest, open_saved
from kilobatch.trainer.monitor.monitor import TIMINGS

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
WORKER = "kilobatch.launch.worker.main"
RECIPE = [*TINY, "data.batch=130", "checkpoint.every_steps=3", "run.name=drill"]


@dataclass(frozen=True)
class Launcher:
    """A command that was started, and a file of what it prints, rank 0's output included."""

    process: subprocess.Popen[bytes]
    printed: BinaryIO

    @property
    def pid(self) -> int:
        return self.process.pid

    def running(self) -> bool:
        return self.process.poll() is None

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def ends(self, code: int, within: float) -> None:
        """Waits until it has ended. Fails where it takes longer than `within` seconds, or ends with another code."""
        deadline = time.monotonic() + within
        while self.running() and time.monotonic() < deadline:
            time.sleep(0.02)
        ended = self.process.poll()
        assert ended is not None, f"it has not ended within {within} s\n{self.last_output()}"
        assert ended == code, f"it ended with {ended}, not with {code}\n{self.last_output()}"

    def output(self) -> str:
        """What it has printed so far."""
        self.printed.seek(0)
        return self.printed.read().decode(errors="replace")

    def last_output(self) -> str:
        """The last lines that it printed, and those of each rank's log, for the message of a failed test. The run
        is found by the command's arguments."""
        printed = self.output()
        arguments = [str(argument) for argument in self.process.args]  # pyright: ignore[reportGeneralTypeIssues]
        runs = [Path(argument) for argument in arguments if Path(argument, "logs").is_dir()]
        for argument in arguments:
            if argument.startswith("run.folder="):
                runs += sorted(Path(argument.removeprefix("run.folder=")).iterdir())
        logs = {str(log): log.read_text(errors="replace") for run in runs for log in sorted(run.glob("logs/*.log"))}
        texts = {" ".join(arguments): printed} | logs
        return "\n".join(f"--- {name}\n{text[-3000:].strip()}" for name, text in texts.items())


def command(*arguments: str) -> Launcher:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    printed = tempfile.TemporaryFile()  # noqa: SIM115  # deleted together with the Launcher
    process = subprocess.Popen(
        [sys.executable, "-m", "kilobatch", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=printed,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return Launcher(process, printed)


def workers_of(launcher: Launcher) -> list[psutil.Process]:
    """Its workers, without its other children, such as the one that estimates the memory beside their start."""
    return [child for child in psutil.Process(launcher.pid).children() if WORKER in arguments_of(child)]


def arguments_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # it has ended
        return []


def logged(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def wait_for(condition: Callable[[], bool], launcher: Launcher) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert launcher.running(), f"the run ended by itself before it was killed\n{launcher.last_output()}"
        assert time.monotonic() < deadline, f"no progress in 120 s\n{launcher.last_output()}"
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


def run_to_the_end(launcher: Launcher) -> None:
    launcher.ends(0, within=240)
