"""Submissions, resubmissions and cancellations as SLURM shows them. All jobs are held: none of them trains."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.__main__ import main
from kilobatch.launch.jobs import cluster as clusters
from kilobatch.launch.recipes.recipe import load_recipe
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.schedulers import slurm
from tests.slurm.cluster import Cluster

Command = Callable[..., str]
HELD = ["demo", "data.batch=480", "--time", "1:00:00", "--cpus-per-worker", "1", "--extra", "hold"]


@pytest.fixture
def command(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Command:
    """Runs a command in an empty folder, without a cluster.yaml. Returns what it prints, refusals too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(*argv: str) -> str:
        with pytest.raises(SystemExit) as left:
            main(list(argv))
        said = capsys.readouterr()
        assert left.value.code in (0, 2), said
        assert (left.value.code == 2) == bool(said.err), said
        return said.out + said.err

    return run


def shown(cluster: Cluster, job: str) -> dict[str, str]:
    """The fields of a job as `scontrol show job` prints them."""
    words = cluster.command("scontrol", "-o", "show", "job", job).split()
    return dict(word.split("=", 1) for word in words if "=" in word)


def the(file: job_history.JobFile | None) -> job_history.JobFile:
    assert file is not None
    return file


def test_a_run_is_queued_cancelled_and_queued_again(cluster: Cluster, command: Command):
    said = command("submit", *HELD, "--nodes", "2", "--workers-per-node", "2", "--comment", "a b", "--name", "mine")
    folder = Path("runs/mine")
    first = the(job_history.read_job_file(folder))
    assert f"job: {first.job_id} (2 nodes × 2 workers)" in said
    assert (first.nodes, first.workers_per_node, first.time_minutes, first.signal_lead_seconds) == (2, 2, 60, 180)
    assert (folder / first.code / "kilobatch" / "launch" / "jobs" / "slurm_job.py").is_file()
    assert run_folder.status(folder) == "queued"
    known = shown(cluster, first.job_id)
    expected = {"JobState": "PENDING", "JobName": "mine", "NumNodes": "2-2", "CPUs/Task": "2", "TimeLimit": "01:00:00"}
    assert known.items() >= {**expected, "Requeue": "1", "Restarts": "0"}.items()
    assert known["StdOut"] == str(folder.absolute() / "submitit" / f"{first.job_id}_0_log.out")

    refusal = f"kilobatch: runs/mine is queued as job {first.job_id}; kilobatch cancel runs/mine ends it\n"
    assert command("resume", "mine") == command("resume", "mine", "--workers", "2") == refusal

    assert command("cancel", "mine") == f"runs/mine: job {first.job_id} cancelled\n"
    assert run_folder.status(folder) == "cancelled"
    assert shown(cluster, first.job_id)["JobState"] == "CANCELLED"
    assert "was over already (cancelled)" in command("cancel", "mine")

    command("resume", "mine", "--nodes", "1")
    second = the(job_history.read_job_file(folder))
    assert (second.nodes, second.workers_per_node, second.earlier) == (1, 2, [first.job_id])
    assert (first.code, second.code) == ("code/001", "code/002")
    assert shown(cluster, second.job_id).items() >= {"NumNodes": "1-1", "Comment": "a"}.items()
    assert run_folder.status(folder) == "queued"
    assert not (folder / "cancelled").exists()
    command("cancel", "mine")


def contents(folder: Path) -> dict[str, bytes]:
    """Of the files in a folder, but for the lock, which has none."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_a_job_that_sbatch_refuses_leaves_all_as_it_was(cluster: Cluster, command: Command, tmp_path: Path):
    said = command("submit", *HELD, "--partition", "nowhere")
    assert said.startswith("kilobatch: sbatch refused the job: invalid partition specified: nowhere")
    assert said.count("\n") == 1
    assert list((tmp_path / "runs").iterdir()) == []

    command("submit", *HELD, "--name", "mine")
    command("cancel", "mine")
    folder = Path("runs/mine")
    before = contents(folder)
    assert before.keys() >= {"cancelled", "cluster.yaml", "job.json", "state.json"}
    assert "invalid partition" in command("resume", "mine", "--partition", "nowhere")
    assert contents(folder) == before
    assert [path.name for path in (folder / "code").iterdir()] == ["001"]


@pytest.mark.parametrize("points", [1, 2])
def test_answers_that_are_lost_after_the_work_is_done(
    points: int, cluster: Cluster, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """SLURM's own commands do the work; what they answer is that the controller did not."""
    monkeypatch.setattr(slurm, "RETRY_PAUSE", 0.1)
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "scancel"):
        script = tmp_path / "bin" / name
        lost = "echo 'error: Socket timed out on send/recv operation' >&2; exit 1"
        script.write_text(f'#!/bin/bash\necho {name} >> {tmp_path}/calls\n{shutil.which(name)} "$@"; {lost}\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    sweep = ["--sweep", "seed=0,1"] if points == 2 else []
    before = cluster.jobs().keys()
    assert "kilobatch cancel runs/mine" in command("submit", *HELD, "--name", "mine", *sweep)
    files = [the(job_history.read_job_file(path.parent)) for path in sorted(Path("runs").rglob("job.json"))]
    assert {file.job_id for file in files} == cluster.jobs().keys() - before
    assert "cancelled" in command("cancel", "mine")
    assert not any(state.open for state in slurm.Slurm().states([file.job_id for file in files]).values())
    assert (tmp_path / "calls").read_text() == "sbatch\nscancel\n"


def test_a_sweep_is_one_array_whose_points_are_cancelled_one_by_one_or_together(cluster: Cluster, command: Command):
    sweep = ["--sweep", "optimizer.lr=0.3,0.6", "--sweep", "seed=0,1", "--array-parallelism", "3", "--name", "lr"]
    said = command("submit", *HELD, *sweep)
    points = sorted(Path("runs/lr").glob("*-*"))
    names = ["0-lr-0.3-seed-0", "1-lr-0.3-seed-1", "2-lr-0.6-seed-0", "3-lr-0.6-seed-1"]
    assert [point.name for point in points] == names
    files = [the(job_history.read_job_file(point)) for point in points]
    array = files[0].job_id.partition("_")[0]
    assert [(file.job_id, file.array_index, file.sweep) for file in files] == [
        (f"{array}_{k}", k, "lr") for k in range(4)
    ]
    assert f"jobs: {array}_0 to {array}_3" in said
    assert shown(cluster, array)["ArrayTaskThrottle"] == "3"
    for point, file in zip(points, files, strict=True):
        assert (point / file.code).resolve() == Path("runs/lr/code/001").resolve()
    resolved = [load_recipe(point / "recipe.yaml")[0] for point in points]
    assert [(one.optimizer.lr, one.run.seed) for one in resolved] == [(0.3, 0), (0.3, 1), (0.6, 0), (0.6, 1)]

    command("cancel", "lr/1-lr-0.3-seed-1")
    assert [run_folder.status(point) for point in points] == ["queued", "cancelled", "queued", "queued"]
    command("resume", "lr/1-lr-0.3-seed-1")
    again = the(job_history.read_job_file(points[1]))
    assert (again.sweep, again.array_index, again.earlier, again.code) == ("lr", None, [f"{array}_1"], "code/001")
    assert command("cancel", "lr").count("cancelled\n") == 4
    assert [run_folder.status(point) for point in points] == ["cancelled"] * 4


def test_all_resources_are_kept_for_the_next_submission(cluster: Cluster, command: Command):
    command("submit", *HELD, "--name", "mine", "--mem-gb", "0.5", "--setup", "export A=1", "--qos", "normal")
    asked = clusters.cluster_again("slurm", Path("runs/mine/cluster.yaml"), {})
    assert (asked.mem_gb, asked.setup, asked.qos, asked.extra) == (0.5, ["export A=1"], "normal", {"hold": True})
    command("cancel", "mine")
    command("resume", "mine", "--setup", "export B=2")
    job = the(job_history.read_job_file(Path("runs/mine"))).job_id
    text = Path(f"runs/mine/submitit/{job}_submission.sh").read_text()
    assert text.index("export A=1") < text.index("export B=2") < text.index("export PYTHONPATH=")
    assert "#SBATCH --mem=512M" in text
    assert shown(cluster, job)["MinMemoryNode"] == "512M"
    command("cancel", "mine")
