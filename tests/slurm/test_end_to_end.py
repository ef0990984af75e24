"""A two-node job on a real SLURM: it trains what `train` trains, and nothing that befalls it changes a bit of that."""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import EPOCHS, EVERY, FEW_EPOCHS, LONG, left_alone, submit, to_the_end


@pytest.mark.slow
def test_signals_requeues_and_a_killed_worker_change_no_bit(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    """All that befalls one job."""
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

    to_the_end(job, whole)
    assert len(job.attempts) == 4
    assert job.row()["requeues"] == {"preemptions": 2, "timeouts": 0, "crashes": 1, "node_failures": 0}


def test_an_untouched_job_trains_what_train_trains(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "untouched", FEW_EPOCHS, *LONG)
    to_the_end(job, left_alone(tmp_path, FEW_EPOCHS))  # both at once
    assert len(job.attempts) == 1


@pytest.mark.slow
def test_a_signal_near_the_time_limit_is_the_limits(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "limited", EPOCHS, "--time", "00:02:00", "--signal-lead", "10")
    job.wait_for_steps()
    cluster.command("scancel", "--signal=USR2", job.id)
    attempt, lost = job.wait_for_attempt(2)
    assert (attempt.reason, attempt.signal, lost) == ("timed_out", "SIGUSR2", 0)
    to_the_end(job, whole)
