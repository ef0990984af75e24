"""Pipelines on a real SLURM: three jobs, of which each waits for the one before, also after requeues, failures,
cancellations and resumes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.pipelines import pipeline
from kilobatch.launch.runs import job_history, run_folder
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job, kilobatch
from tests.slurm.test_submitting import command, shown, the

Command = Callable[..., str]
__all__ = ["command"]  # a fixture
TINY = [
    "simclr_v2_digits",
    "data.views.size=16",
    "data.threads=1",
    "run.log_every=1",
    "pretrain.encoder.width=4",
    "distill.encoder.width=2",
    "pretrain.schedule.epochs=1",
    "pretrain.evaluate.final=[knn]",
    "schedule.warmup_epochs=0",
    "evaluate.every_epochs=0",
    "finetune.schedule.epochs=60",
    "finetune.checkpoint.every_steps=5",
    "distill.schedule.epochs=1",
]
STAGES = [Path("runs/mine") / stage for stage in pipeline.STAGES]
ASKED = ["--time", "1:00:00", "--workers-per-node", "2", "--cpus-per-worker", "1", "--name", "mine"]


def ids() -> list[str]:
    return [the(job_history.read_job_file(stage)).job_id for stage in STAGES]


def test_each_waits_for_the_one_before_and_all_are_cancelled(cluster: Cluster, command: Command):
    said = command("pipeline", "simclr_v2_digits", *ASKED, "--extra", "hold")
    first = ids()
    assert f"finetune: job {first[1]}, after pretrain" in said
    known = [shown(cluster, job) for job in first]
    assert [one["JobName"] for one in known] == ["mine-pretrain", "mine-finetune", "mine-distill"]
    waits = [one["Dependency"].partition("(")[0] for one in known]
    assert waits == ["", f"afterok:{first[0]}", f"afterok:{first[1]}"]
    codes = {(stage / the(job_history.read_job_file(stage)).code).resolve() for stage in STAGES}
    assert codes == {Path("runs/mine/code/001").resolve()}
    assert [run_folder.status(stage) for stage in STAGES] == ["queued"] * 3
    assert f"is queued as job {first[0]}" in command("resume", "mine")

    assert command("cancel", "mine").count("cancelled\n") == 3
    assert [run_folder.status(stage) for stage in STAGES] == ["cancelled"] * 3
    assert "mine/pretrain, which is cancelled" in command("resume", "mine/finetune")

    command("resume", "mine/pretrain")  # the first stage gets a new job; the others are queued behind it
    command("resume", "mine")
    second = ids()
    assert not {*first} & {*second}
    waits = [shown(cluster, job)["Dependency"].partition("(")[0] for job in second]
    assert waits == ["", f"afterok:{second[0]}", f"afterok:{second[1]}"]

    for stage in STAGES[:1]:
        run_folder.set_status(stage, "finished", 2)
    cluster.command("scancel", second[0])
    command("cancel", "mine/finetune", "mine/distill")
    command("resume", "mine")  # a stage that has finished is not queued again
    third = ids()
    assert third[0] == second[0] and not {*third[1:]} & {*second}
    waits = [shown(cluster, job)["Dependency"].partition("(")[0] for job in third[1:]]
    assert waits == ["", f"afterok:{third[1]}"]
    command("cancel", "mine")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_requeue_delays_the_next_and_a_failure_ends_the_rest(cluster: Cluster, tmp_path: Path) -> None:
    changes = ["pretrain.schedule.epochs=40", "pretrain.checkpoint.every_steps=20", "run.requeue.crashes=0"]
    changes += ["pretrain.data.batch=132", "finetune.schedule.epochs=400"]
    kilobatch("pipeline", *TINY, *changes, *ASKED, folder=tmp_path)
    pretrain, finetune, distill = (Job(cluster, tmp_path / stage) for stage in STAGES)
    pretrain.wait_for_steps()
    cluster.command("scancel", "--signal=USR2", pretrain.id)
    attempt, lost = pretrain.wait_for_attempt(2)
    assert (attempt.reason, lost) == ("preempted", 0)
    assert run_folder.read_state(finetune.run).status == "queued", (
        "a requeued job has not finished, though it exits with 0"
    )
    pretrain.wait_for_state("COMPLETED")

    finetune.wait_for_steps()
    finetune.worker(1).kill()
    finetune.wait_for_state("FAILED")
    distill.wait_for_state("CANCELLED")
    assert job_history.read_attempts(distill.run) == []
    before = finetune.id
    kilobatch("resume", "mine", folder=tmp_path)
    assert finetune.id != before and pretrain.row()["state"] == "finished"
    distill.wait_for_state("COMPLETED")
    logs = list((distill.run / "submitit").glob(f"{distill.id}_*_log.out"))
    assert "fine-tuned (teacher)" in "".join(log.read_text() for log in logs)
    assert len(json.loads((tmp_path / "runs/mine/pipeline.json").read_text())) == 3
