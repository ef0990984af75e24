"""A job that fails ends soon, `status` and `logs` name the rank, and it is requeued within limits."""

import time
from datetime import datetime
from pathlib import Path

import pytest

from kilobatch.launch.runs import job_history
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, kilobatch, submit

FIRE = "the disk of rank 3 is on fire"


def burning(cluster: Cluster, folder: Path, *more: str) -> Job:
    """Submits a job whose rank 3 raises in its eighth step. The code that raises is added to the job's snapshot."""
    job = submit(cluster, folder, "burning", "--time", "01:00:00", "--extra", "hold", *more)
    submitted = job_history.read_job_file(job.run)
    assert submitted
    loop = job.run / submitted.code / "kilobatch" / "trainer" / "loop.py"
    before = "        outcome = forward_backward("
    text = loop.read_text()
    assert before in text
    raises = f"        if step == 7 and collectives.rank() == 3:\n            raise RuntimeError('{FIRE}')\n"
    loop.write_text(text.replace(before, raises + before))
    cluster.command("scontrol", "release", job.id)
    return job


def test_a_rank_that_raises_ends_the_job_and_is_named(cluster: Cluster, tmp_path: Path) -> None:
    job = burning(cluster, tmp_path, "run.requeue.crashes=0")
    job.wait_for_state("FAILED")
    over = time.time()
    (line,) = (line for line in (job.run / "logs" / "rank-3.log").read_text().splitlines() if f"Error: {FIRE}" in line)
    assert over - datetime.fromisoformat(line.split()[0]).timestamp() < 30

    row = job.row()
    assert (row["state"], row["rank"], row["host"]) == ("failed", 3, "n1")
    assert FIRE in "\n".join(row["lines"])
    said = kilobatch("status", folder=tmp_path)
    assert "burning: rank 3 on n1: crashed, exit code 1" in said
    assert FIRE in said
    told = kilobatch("logs", "burning", folder=tmp_path)
    assert "rank 3 on n1: exit code 1" in told
    assert f"rank 3 | RuntimeError: {FIRE}" in told


@pytest.mark.slow
def test_a_crash_that_repeats_at_the_same_step_stops(cluster: Cluster, tmp_path: Path) -> None:
    job = burning(cluster, tmp_path)
    job.wait_for_state("FAILED")
    first, second = job.attempts
    assert (first.reason, first.requeued, second.reason, second.requeued) == ("crashed", True, "crashed", False)
    assert first.step == second.step == 7
    assert second.stopped and "same step" in second.stopped
