"""What a cluster does to jobs besides: nodes go down, jobs that matter more come, time runs out."""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import EPOCHS, EVERY, LONG, kilobatch, submit, to_the_end

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def test_a_node_that_loses_power_costs_one_checkpoint_interval(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    """First the other node, then the one that keeps the books."""
    job = submit(cluster, tmp_path, "powerless", EPOCHS, *LONG)
    for number, node in enumerate((1, 0), start=2):
        job.wait_for_steps()
        host = job.attempts[-1].nodes[node]
        cluster.kill_node(host)
        _, lost = job.wait_for_attempt(number)
        assert lost <= EVERY
        cluster.start_node(host)
    to_the_end(job, whole)
    assert job.row()["requeues"]["node_failures"] == 2


def test_a_killed_slurmd_changes_no_bit(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    """Its workers run on without it, until SLURM has noticed."""
    job = submit(cluster, tmp_path, "orphan", EPOCHS, *LONG)
    job.wait_for_steps()
    host = job.attempts[-1].nodes[1]
    cluster.kill_slurmd(host)
    _, lost = job.wait_for_attempt(2)
    assert lost <= EVERY
    cluster.start_node(host)
    to_the_end(job, whole)


def test_a_job_that_matters_more_costs_no_step(cluster: Cluster, whole: Path, tmp_path: Path) -> None:
    """Its preemption is SIGTERM, and SIGKILL KillWait later."""
    job = submit(cluster, tmp_path, "preempted", EPOCHS, *LONG)
    job.wait_for_steps()
    cluster.command("sbatch", "-p", "high", "-N3", "--exclusive", "-o", "/dev/null", "--wrap", "srun sleep 1")
    attempt, lost = job.wait_for_attempt(2)
    assert (attempt.reason, attempt.signal, lost) == ("preempted", "SIGTERM", 0)
    to_the_end(job, whole)


def test_a_time_limit_costs_no_step(cluster: Cluster, tmp_path: Path) -> None:
    """SLURM's own signal, at its own time."""
    job = submit(cluster, tmp_path, "limited", "schedule.epochs=4000", "--time", "00:02:00", "--signal-lead", "10")
    attempt, lost = job.wait_for_attempt(2)
    assert (attempt.reason, attempt.signal, lost) == ("timed_out", "SIGUSR2", 0)
    kilobatch("cancel", str(job.run), folder=tmp_path)
    job.wait_for_state("CANCELLED", "COMPLETED")
    assert job.row()["state"] == "cancelled"
