"""Runs that cannot fit into memory, by the real commands under a real limit on the address space (ulimit -v)."""

import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kilobatch.launch.runs import job_history, run_folder
from tests.helpers.memory_group import memory_group

SPACE = 7 << 30  # bytes; libraries take some 3 GiB of it, and less of the memory
SHORT = ["schedule.epochs=1", "schedule.warmup_epochs=0", "evaluate.every_epochs=0", "evaluate.final=[]"]
BIG = ["demo", "encoder.width=4", "data.batch=1434", "data.views.size=128", "data.threads=1", *SHORT]  # 7.0 GiB

# What the plan says of BIG, in a message about a worker that has ended.
ADVICE = r"kilobatch plan says 7\.\d GiB a worker; .*use data.batch=\d+ \([\d.]+ [GM]iB\); log: "


def ran(*arguments: str, group: Path | None = None, within: float = 300) -> subprocess.CompletedProcess[str]:
    def limit() -> None:
        if group is None:
            resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
        else:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.run(
        [sys.executable, "-m", "kilobatch", *arguments],
        preexec_fn=limit,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=within,
    )


def test_what_cannot_fit_is_refused_and_fits_with_the_change_that_is_named(tmp_path: Path) -> None:
    folder = f"run.folder={tmp_path}"
    refused = ran("train", *BIG, folder, "--workers", "1")
    assert refused.returncode == 2, refused.stderr
    match = re.search(
        r"kilobatch: this run cannot fit into memory: 1434 images a rank need 7\.\d GiB \(.+\) at their most, in the "
        r"\w+, and this machine has ([\d.]+) GiB free.*; .*use (data.batch=\d+) \(([\d.]+) ([GM])iB\), or "
        r"--anyway if you mean it",
        refused.stderr,
    )
    assert match and float(match[3]) / (1024 if match[4] == "M" else 1) < float(match[1]) / 2 < 3, refused.stderr
    assert not list(tmp_path.iterdir()), "a run folder was left behind"
    trained = ran("train", *BIG, match[2], folder, "run.name=r", "--workers", "1")
    assert trained.returncode == 0, trained.stderr
    assert run_folder.read_state(tmp_path / "r").status == "finished"


@pytest.mark.slow
def test_anyway_trains_and_its_end_tells_what_it_held_and_what_the_plan_says(tmp_path: Path) -> None:
    run = tmp_path / "r"
    ended = ran("train", *BIG, f"run.folder={tmp_path}", "run.name=r", "--workers", "1", "--anyway")
    assert ended.returncode == 1, ended.stderr
    assert re.search(r"rank 0 failed first: out of memory; it held [\d.]+ [GM]iB; " + ADVICE, ended.stderr), (
        ended.stderr
    )
    again = ran("resume", str(run), "--workers", "1")  # is asked, too, and keeps the run
    assert again.returncode == 2 and "this run cannot fit into memory" in again.stderr, again.stderr
    assert run_folder.read_state(run).status == "failed"


@pytest.mark.slow
def test_a_job_is_refused_where_it_runs(tmp_path: Path) -> None:
    run = tmp_path / "r"
    submitted = ran("submit", *BIG, f"run.folder={tmp_path}", "--name", "r", "--cluster", "local")
    assert submitted.returncode == 0, submitted.stderr
    until = time.monotonic() + 200
    while not (attempts := job_history.read_attempts(run)) or not attempts[-1].ended:
        assert time.monotonic() < until
        time.sleep(0.2)
    assert (attempts[-1].reason, attempts[-1].requeued) == ("refused", False)
    assert any("this run cannot fit into memory: 1434 images a rank need 7." in line for line in attempts[-1].lines)


@pytest.mark.slow
def test_a_worker_that_the_kernel_kills_for_want_of_memory(tmp_path: Path) -> None:
    with memory_group(3 << 30) as group:
        killed = ran("train", *BIG, f"run.folder={tmp_path}", "--workers", "1", "--anyway", group=group)
    assert killed.returncode == 1, killed.stderr
    how = r"rank 0 failed first: killed by the kernel for want of memory; it held (2\.\d|3\.0) GiB; "
    assert re.search(how + ADVICE, killed.stderr), killed.stderr
