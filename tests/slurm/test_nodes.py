"""Jobs whose nodes go down, that are preempted by others, or that reach their time limit."""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import EPOCHS, EVERY, LONG, assert_ends_like, kilobatch, submit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_node_that_loses_power_costs_one_checkpoint_interval(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    """First the other node loses power, then node 0, which writes attempts.jsonl."""
    job = submit(cluster, tmp_path, "powerless", EPOCHS, *LONG)
    for number, node in enumerate((1, 0), start=2):
        job.wait_for_steps()
        host = job.attempts[-1].nodes[node]
        cluster.kill_node(host)
        _, lost = job.wait_for_attempt(number)
        assert lost <= EVERY
        cluster.start_node(host)
    assert_ends_like(job, whole)
    assert job.row()["requeues"]["node_failures"] == 2


def test_a_killed_slurmd_changes_no_bit(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    """Its workers go on without it until SLURM notices."""
    job = submit(cluster, tmp_path, "orphan", EPOCHS, *LONG)
    job.wait_for_steps()
    host = job.attempts[-1].nodes[1]
    cluster.kill_slurmd(host)
    _, lost = job.wait_for_attempt(2)
    assert lost <= EVERY
    cluster.start_node(host)
    assert_ends_like(job, whole)


def test_a_preemption_costs_no_step(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    """SLURM preempts with SIGTERM, and SIGKILL KillWait seconds later."""
    job = submit(cluster, tmp_path, "preempted", EPOCHS, *LONG)
    job.wait_for_steps()
    cluster.command("sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "srun sleep 1")
    attempt, lost = job.wait_for_attempt(2)
    assert (attempt.reason, attempt.signal, lost) == ("preempted", "SIGTERM", 0)
    assert_ends_like(job, whole)


def test_a_time_limit_costs_no_step(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM itself sends the signal that announces the time limit."""
    job = submit(cluster, tmp_path, "limited", "schedule.epochs=4000", "--time", "00:02:00", "--signal-lead", "10")
    attempt, lost = job.wait_for_attempt(2)
    assert (attempt.reason, attempt.signal, lost) == ("timed_out", "SIGUSR2", 0)
    kilobatch("cancel", str(job.run), folder=tmp_path)
    job.wait_for_state("CANCELLED", "COMPLETED")
    assert job.row()["state"] == "cancelled"
