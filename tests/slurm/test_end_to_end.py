"""A job of two nodes on a real SLURM ends bitwise as `kilobatch train`, also after signals, requeues and kills."""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import EPOCHS, EVERY, FEW_EPOCHS, LONG, assert_ends_like, submit, train_uninterrupted


@pytest.mark.slow
def test_signals_requeues_and_a_killed_worker_change_no_bit(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    """One job gets them all."""
    job = submit(cluster, tmp_path, "drilled", EPOCHS, *LONG)

    job.wait_for_steps()
    cluster.command("scancel", "--signal=USR2", job.id)
    attempt, lost = job.wait_for_attempt(2)
    assert (attempt.reason, attempt.signal, lost) == ("preempted", "SIGUSR2", 0)

    job.wait_for_steps()
    cluster.command("scontrol", "requeue", job.id)  # SIGTERM, and SIGKILL after KillWait
    attempt, lost = job.wait_for_attempt(3)
    assert (attempt.reason, attempt.signal, lost) == ("preempted", "SIGTERM", 0)

    job.wait_for_steps()
    job.worker(3).kill()
    attempt, lost = job.wait_for_attempt(4)
    assert (attempt.reason, attempt.rank, attempt.host) == ("crashed", 3, "n1")
    assert attempt.how and "SIGKILL" in attempt.how
    assert 0 < lost <= EVERY

    assert_ends_like(job, whole)
    assert len(job.attempts) == 4
    assert job.row()["requeues"] == {"preemptions": 2, "timeouts": 0, "crashes": 1, "node_failures": 0}


def test_a_job_without_interruptions_trains_what_train_trains(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "untouched", FEW_EPOCHS, *LONG)
    assert_ends_like(job, train_uninterrupted(tmp_path, FEW_EPOCHS))  # both at once
    assert len(job.attempts) == 1


@pytest.mark.slow
def test_a_signal_near_the_time_limit_counts_as_the_time_limit(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "limited", EPOCHS, "--time", "00:02:00", "--signal-lead", "10")
    job.wait_for_steps()
    cluster.command("scancel", "--signal=USR2", job.id)
    attempt, lost = job.wait_for_attempt(2)
    assert (attempt.reason, attempt.signal, lost) == ("timed_out", "SIGUSR2", 0)
    assert_ends_like(job, whole)
