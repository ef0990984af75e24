"""Jobs of a tiny recipe on the tests' SLURM, submitted by the real command: waits for what happens to them, and
compares their end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from kilobatch.launch.runs import job_history
from kilobatch.launch.runs.job_history import Attempt
from tests.helpers.real_runs import TINY, command, lines_without_timings, weights
from tests.slurm.cluster import NODES, Cluster

EVERY = 20  # steps between two checkpoints
RECIPE = [*TINY, "data.batch=132", f"checkpoint.every_steps={EVERY}"]  # ten steps an epoch
TWO_NODES = ["--nodes", "2", "--workers-per-node", "2", "--cpus-per-worker", "1"]
EPOCHS = "schedule.epochs=40"  # 400 steps: time enough for several interruptions
FEW_EPOCHS = "schedule.epochs=10"  # 100 steps, 5 checkpoints and an evaluation on the way
LONG = ["--time", "01:00:00"]
HERE = {"PYTHONPATH": str(Path(__file__).resolve().parents[2] / "src"), "OMP_NUM_THREADS": "1"}
TIMEOUT = 600.0  # seconds to wait for an event: a start takes 15 on two idle cores, and minutes on busy ones


def kilobatch(*arguments: str, folder: Path, timeout: float = TIMEOUT) -> str:
    """Runs a command in `folder`, where its runs/ are. Returns what it prints. Fails where the command does."""
    done = subprocess.run(
        [sys.executable, "-m", "kilobatch", *arguments],
        cwd=folder,
        env=os.environ | HERE,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@dataclass(frozen=True)
class Job:
    """A job of `cluster`, and the folder of its run."""

    cluster: Cluster
    run: Path

    @property
    def id(self) -> str:
        job = job_history.read_job_file(self.run)
        assert job
        return job.job_id

    @property
    def attempts(self) -> list[Attempt]:
        return job_history.read_attempts(self.run)

    def row(self) -> dict[str, Any]:
        """The run's entry in `kilobatch status --json`."""
        (row,) = json.loads(kilobatch("status", str(self.run), "--json", folder=self.run.parent))
        return row

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {TIMEOUT:.0f} s\n{self.last_output()}"
            time.sleep(0.02)

    def wait_for_state(self, *states: str) -> None:
        self.wait(lambda: self.cluster.jobs()[self.id] in states, f"job {self.id} is {' or '.join(states)}")

    def wait_for_steps(self, beyond: int = 5) -> None:
        """Waits until its newest attempt has made `beyond` steps after a checkpoint, so that a kill loses them."""
        attempts = len(self.attempts) or 1

        def has_advanced() -> bool:
            now = self.attempts
            if len(now) < attempts or now[-1].ended:
                return False
            saved = job_history.checkpoint_step(self.run)
            return saved > now[-1].from_step and job_history.last_step(self.run) >= saved + beyond

        self.wait(has_advanced, f"attempt {attempts} makes steps")

    def wait_for_attempt(self, number: int) -> tuple[Attempt, int]:
        """Waits until the attempt of this number, from 1, has begun. Returns the attempt before it, and how many of its
        steps are repeated."""
        self.wait(lambda: len(self.attempts) >= number, f"attempt {number} begins")
        before, now = self.attempts[number - 2 : number]
        # A killed attempt could not write its last step. metrics.jsonl has it until the next attempt cuts it off.
        reached = job_history.last_step(self.run) if before.step is None else before.step
        return before, reached - now.from_step

    def worker(self, rank: int) -> psutil.Process:
        found = [
            process
            for node in NODES
            for process in self.cluster.processes(node)
            if process.environ().get("RANK") == str(rank) and str(self.run) in process.cmdline()
        ]
        assert len(found) == 1, found
        return found[0]

    def last_output(self) -> str:
        """The last lines of its logs, for the message of a failed test."""
        return kilobatch("logs", str(self.run), "-n", "60", folder=self.run.parent)


def submit(cluster: Cluster, folder: Path, name: str, *more: str) -> Job:
    kilobatch("submit", *RECIPE, *TWO_NODES, "--name", name, *more, folder=folder)
    return Job(cluster, folder / "runs" / name)


def train_uninterrupted(folder: Path, epochs: str) -> Path:
    """Trains the same recipe by `kilobatch train --workers 4`. Returns the run."""
    launcher = command("train", *RECIPE, epochs, "run.name=whole", f"run.folder={folder}", "--workers", "4")
    launcher.ends(0, within=TIMEOUT)
    return folder / "whole"


def assert_ends_like(job: Job, whole: Path) -> None:
    """Asserts that the job finishes with the weights and the metrics of `whole`, which was not interrupted."""
    job.wait_for_state("COMPLETED")
    assert job.row()["state"] == "finished"
    expected, found = weights(whole), weights(job.run)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert lines_without_timings(whole) == lines_without_timings(job.run)
