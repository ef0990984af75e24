"""`kilobatch drill`, as a user runs it: on a cluster, and in the background of this machine."""

from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.jobs import RECIPE, TWO_NODES, kilobatch

HERE = ["--cluster", "local", "--workers-per-node", "2"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("where", [[*TWO_NODES, "--time", "01:00:00"], HERE], ids=["slurm", "local"])
def test_it_reports_what_a_signal_and_a_kill_cost(cluster: Cluster, tmp_path: Path, where: list[str]) -> None:
    said = kilobatch("drill", *RECIPE, "schedule.epochs=30", *where, folder=tmp_path, timeout=1500)
    rows = {line.split("│")[1].strip(): int(line.split("│")[2]) for line in said.splitlines() if line.count("│") == 4}
    assert rows["asked to stop (SIGUSR2)"] == 0
    assert 0 < rows["a worker killed"] <= 25
    assert "final weights: equal to the bit" in said
