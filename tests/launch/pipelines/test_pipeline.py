"""Pipelines: recipes are checked before the first stage begins, stages run in order, and a pipeline can be resumed
after any end."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.jobs import local_queue
from kilobatch.launch.pipelines import pipeline
from kilobatch.launch.pipelines.results import count_parameters, read_results
from kilobatch.launch.pipelines.stages import PipelineRequest, Stage, create_runs, plan_pipeline
from kilobatch.launch.recipes.recipe import load_recipe, resolve_recipe
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import JobFile
from tests.helpers.programs import PROGRAMS
from tests.helpers.real_runs import command, logged
from tests.launch.cli.test_login_node_imports import COMMAND, ran
from tests.launch.conftest import CommandResult
from tests.launch.jobs.test_local_queue import LOCAL, ends, is_over, until

CODE = Path(__file__).parents[3] / "src"
TIMEOUT = 600.0  # seconds, since the machine may be busy
SHORT = [
    "simclr_v2_digits",
    "data.views.size=16",
    "data.threads=1",
    "run.log_every=1",
    "evaluate.every_epochs=0",
    "pretrain.schedule.epochs=30",
    "distill.schedule.epochs=60",
    "pretrain.evaluate.final=[]",
    "finetune.checkpoint.every_steps=5",
]


@pytest.fixture
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED: dict[str, tuple[str, list[str]]] = {
    "a mistake in the last stage": ("distill.schedule.epochs=0", ["distill: override", "schedule.epochs is 0"]),
    "a batch of the last stage": ("distill.data.batch=477", ["distill: ", "477", "use 476 or 478"]),
    "another encoder to fine-tune": ("finetune.encoder.width=7", ["finetune: ", "encoder.width", "7 here"]),
    "data of the last stage": ("distill.data.train=no.beton", ["distill: ", "no.beton does not exist"]),
    "other classes": ("distill.data.train=npz:three.npz distill.data.batch=6", ["distill: ", "(3 classes)", "(10)"]),
    "no such stage": ("fine.schedule.epochs=3", ["'fine' is neither a stage nor a section", "did you mean 'finetune'"]),
    "a stage and no key": ("finetune=3", ["not of the form stage.section.key=value"]),
    "a key of one stage for all": (
        "method.layers=2",
        ["finetune: ", "'layers'", "for one stage alone: STAGE.method.layers=2"],
    ),
    "more layers than the head will have": (
        "finetune.method.layer=4",
        ["finetune: ", "method.layer is 4", "has 3 layers of a projection head; use method.layer=3 method.dim=128"],
    ),
    "a name of a stage's run": ("finetune.run.name=x", ["a pipeline sets run.name itself", "--name"]),
    "a start of one's own": ("finetune.method.start=x", ["sets method.start itself", "--pretrained"]),
    "labels that are no share": ("--labels 1", ["--labels 1:", "1%", "100%"]),
    "labels that are no file": ("--labels 1pct.txt", ["1pct.txt is neither a share", "nor a file"]),
    "a stage that was left out": ("--pretrained x pretrain.seed=1", ["no stage pretrain here", "--pretrained"]),
    "a start that is not there": ("--pretrained x.safetensors", ["finetune: ", "x.safetensors"]),
    "labels of a stage that is left out": (
        "--teacher x --labels 1%",
        ["--teacher leaves", "--labels", "leave one out"],
    ),
    "a teacher that is not there": (
        "--teacher x.pth",
        ["distill: --teacher: method.teacher '", "/x.pth'", "there is no run"],
    ),
    "here and there": ("--cluster local", ["--workers trains here, --cluster on a cluster"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_is_made(what: str, kilobatch: Callable[..., CommandResult], tmp_path: Path):
    import numpy as np

    np.savez(tmp_path / "three.npz", images=np.zeros((9, 8, 8, 3), np.uint8), labels=np.arange(9) % 3)
    arguments, parts = REFUSED[what]
    result = kilobatch("pipeline", "simclr_v2_digits", *arguments.split(), "--workers", "2")
    assert (result.code, result.out) == (2, "")
    for part in parts:
        assert part in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_recipe_without_stages_says_which_have_them(kilobatch: Callable[..., CommandResult]):
    result = kilobatch("pipeline", "demo", "--workers", "2")
    assert "needs the recipe 'demo_finetune'" in result.err
    assert "simclr_v2_digits" in result.err and "simclr_v2_imagenet" in result.err


def test_a_teacher_leaves_the_distillation_alone(empty_folder: Path):
    (empty_folder / "w.pth").write_bytes(b"PK")
    planned = plan_pipeline(PipelineRequest("simclr_v2_digits", ["distill.schedule.epochs=3"], teacher="w.pth"), "mine")
    assert [stage.name for stage in planned.stages] == ["distill"] == [*planned.pipeline.recipes]
    recipe = planned.stages[0].recipe
    assert (recipe.method.model_dump()["teacher"], recipe.schedule.epochs) == (str(empty_folder / "w.pth"), 3)
    run = create_runs(planned, 1)[0]
    assert pipeline.stage_folders(run.parent) == [run] and pipeline.reason_to_wait(run) is None


def test_stages_take_from_the_one_before(empty_folder: Path):
    changes = ["optimizer.momentum=0.8", "pretrain.encoder.width=4", "finetune.schedule.epochs=3", "seed=7"]
    planned = plan_pipeline(PipelineRequest("simclr_v2_digits", changes, labels="7%"), "mine")
    first, second, third = (stage.recipe for stage in planned.stages)
    top = empty_folder / "runs" / "mine"
    assert planned.top == Path("runs/mine")
    assert [stage.name for stage in planned.stages] == ["pretrain", "finetune", "distill"]
    assert second.method.model_dump()["start"] == str(top / "pretrain")
    assert third.method.model_dump()["teacher"] == str(top / "finetune")
    assert [one.optimizer.momentum for one in (first, second, third)] == [0.8] * 3
    assert [one.run.seed for one in (first, second, third)] == [7] * 3
    assert (first.encoder.width, second.encoder.width) == (4, 4), "all stages but the last have the same network"
    assert second.schedule.epochs == 3 != third.schedule.epochs
    assert second.data.labels.share == third.data.labels.share == 0.07, (
        "the student sees no label that its teacher did not"
    )
    self_distilled = plan_pipeline(
        PipelineRequest("simclr_v2_digits", ["pretrain.encoder.width=4"], self_distill=True), "mine"
    )
    assert [stage.recipe.encoder.width for stage in self_distilled.stages] == [4] * 3
    assert self_distilled.stages[2].recipe_name == "simclr_v2_digits_selfdistill"


def test_the_share_of_labels_decides_on_the_recipe(empty_folder: Path):
    def finetune(labels: str | None) -> Stage:
        return plan_pipeline(PipelineRequest("simclr_v2_imagenet", [], labels=labels), "mine").stages[1]

    for labels, name, share in (
        ("1%", "simclr_v2_imagenet_finetune_1pct", 0.01),
        ("0.10", "simclr_v2_imagenet_finetune_10pct", 0.1),
        ("2.5%", "simclr_v2_imagenet_finetune", 0.025),
        ("100%", "simclr_v2_imagenet_finetune", 1.0),
    ):
        stage = finetune(labels)
        assert (stage.recipe_name, stage.recipe.data.labels.share) == (name, share)
    Path("1percent.txt").write_text("a.JPEG\n")
    assert finetune("1percent.txt").recipe.data.labels.list == str(empty_folder / "1percent.txt")


def test_a_recipe_file_has_its_stages_beside_it(empty_folder: Path):
    for suffix in ("", "_finetune", "_distill"):
        Path(f"mine{suffix}.yaml").write_text(f"extends: simclr_v2_digits{suffix}\n")
    planned = plan_pipeline(PipelineRequest("mine.yaml", []), None)
    assert [stage.recipe_name for stage in planned.stages] == ["mine.yaml", "mine_finetune.yaml", "mine_distill.yaml"]
    assert planned.top.name.startswith("mine-")


def test_three_scripts_for_sbatch(
    kilobatch: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    resources = ["--nodes", "2", "--time", "1:00:00", "--extra", "dependency=singleton"]
    result = kilobatch("pipeline", "simclr_v2_digits", "--name", "mine", "--dry-run", *resources)
    assert (result.code, result.err) == (0, "")
    texts = result.out.split("#!/bin/bash\n")[1:]
    assert [f"--job-name=mine-{stage}\n" in text for stage, text in zip(pipeline.STAGES, texts, strict=True)] == [
        True
    ] * 3
    waits = ["singleton", "afterok:JOB-OF-pretrain", "afterok:JOB-OF-finetune"]
    for text, wait in zip(texts, waits, strict=True):
        assert text.count("--dependency") == 1
        assert f"#SBATCH --dependency={wait}\n" in text
    assert ["--kill-on-invalid-dep=yes" in text for text in texts] == [False, True, True]
    assert not Path("runs").exists()


def test_a_mistake_in_the_last_stage_is_refused_before_torch_is_loaded(tmp_path: Path):
    done = ran(COMMAND, tmp_path, "pipeline", "simclr_v2_digits", "distill.data.batch=477", "--workers", "2")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "use 476 or 478" in done.stderr


def test_the_demo_student_is_small_and_sees_few_labels():
    """The student has at most a quarter of its teacher's parameters; both use 5 % of the labels."""
    teacher, student = (resolve_recipe(f"simclr_v2_digits_{stage}", []) for stage in ("finetune", "distill"))
    assert count_parameters(student) * 4 <= count_parameters(teacher)
    assert teacher.data.labels.share == 0.05 and student.data.unlabelled == "keep"


@pytest.mark.timeout(1800)
def test_the_digits_pipeline_shortened_and_killed_once(empty_folder: Path):
    """The pipeline is killed while fine-tuning. Resumed, it does not repeat the finished stage, and its table shows
    that fine-tuning beats training from scratch, and that a small student is hardly worse than its teacher."""
    launcher = command("pipeline", *SHORT, "--scratch", "--name", "mine", "--workers", "2")
    top = Path("runs/mine")
    try:
        until(lambda: logged(top / "finetune") > 8 or not launcher.running(), TIMEOUT)
        assert [run_folder.status(top / stage) for stage in pipeline.STAGES] == ["finished", "running", "new"]
    finally:
        os.killpg(launcher.pid, signal.SIGKILL)
        launcher.process.wait()
    before = (top / "pretrain" / "metrics.jsonl").stat().st_mtime_ns
    command("resume", "mine/distill").ends(2, TIMEOUT)  # its teacher has not finished

    command("resume", "mine").ends(0, TIMEOUT)
    assert [run_folder.status(top / stage) for stage in (*pipeline.STAGES, "scratch")] == ["finished"] * 4
    assert (top / "pretrain" / "metrics.jsonl").stat().st_mtime_ns == before
    steps = {json.loads(line)["step"] for line in (top / "finetune" / "metrics.jsonl").read_text().splitlines()}
    assert steps == set(range(1, load_recipe(top / "finetune" / "recipe.yaml")[0].schedule.epochs + 1))
    rows = read_results(top)
    assert [(row.stage, row.labels, row.images) for row in rows] == [
        ("pretrain", 0, 1437),
        ("finetune", 72, 1437),
        ("distill", 72, 1437),
        ("scratch", 72, 1437),
    ]
    command("resume", "mine").ends(2, TIMEOUT)  # all stages have finished

    teacher, student, from_scratch = (row.values["classify_moved/top1"] for row in rows[1:])
    print(f"from scratch {from_scratch:.1%}, fine-tuned {teacher:.1%}, student {student:.1%}")
    assert teacher >= from_scratch + 0.05
    assert student >= teacher - 0.02
    assert rows[2].parameters * 4 <= rows[1].parameters == rows[3].parameters


def test_stages_after_one_that_failed_do_not_begin(empty_folder: Path, monkeypatch: pytest.MonkeyPatch):
    """In the background of this machine, where it is as with dependent jobs on SLURM."""
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))
    monkeypatch.setattr(local_queue, "_arguments", lambda folders: [sys.executable, "-c", LOCAL, *map(str, folders)])
    planned = plan_pipeline(PipelineRequest("simclr_v2_digits", ["run.requeue.crashes=0"]), "mine")
    stages = create_runs(planned, 2)
    for stage, errand in zip(stages, ("finishes", "fails", "finishes"), strict=True):
        (stage / "errands").write_text(errand)
        job = JobFile(cluster="local", job_id="", workers_per_node=2, submitted=job_history.utc_now(), code="code/001")
        job_history.write_job_file(stage, job)
        run_folder.set_status(stage, "queued", 2)
    ids = local_queue.start([stage.absolute() for stage in stages], CODE)
    until(lambda: is_over(ids[-1]), TIMEOUT)
    assert [run_folder.status(stage) for stage in stages] == ["finished", "failed", "cancelled"]
    assert [len(ends(stage)) for stage in stages] == [1, 1, 0]
    assert "not begun: " in (planned.top / "submitit" / "local.log").read_text()


def test_status_shows_the_stages_and_the_table(kilobatch: Callable[..., CommandResult]):
    planned = plan_pipeline(PipelineRequest("simclr_v2_digits", []), "mine")
    create_runs(planned, 1)
    result = kilobatch("status", "mine", "--json")
    assert [row["run"] for row in json.loads(result.out)] == ["mine/distill", "mine/finetune", "mine/pretrain"]
    row = {"stage": "finetune", "encoder": "convnet", "parameters": 160000, "labels": 72, "images": 1437}
    (planned.top / "pipeline.json").write_text(json.dumps([row | {"values": {"classify/top1": 0.875}}]))
    result = kilobatch("status", "mine")
    assert "mine/pretrain" in result.out and "0.160 M" in result.out and "87.5%" in result.out
    assert "runs/mine/distill was not submitted" in kilobatch("cancel", "mine").err
    assert "runs/mine/finetune waits for runs/mine/pretrain, which is new" in kilobatch("resume", "mine/finetune").err
