"""Changes that the command line names: written whole, recorded from their step, and refused before anything is
written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.jobs import code_snapshot, submit
from kilobatch.launch.pipelines.pipeline import Pipeline
from kilobatch.launch.processes import launcher
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.recipes import changes
from kilobatch.launch.recipes.continuation import describe_schedule, moved_data
from kilobatch.launch.recipes.data import prepare_data
from kilobatch.launch.recipes.recipe import load_recipe, resolve_recipe
from kilobatch.launch.runs import run_folder
from kilobatch.launch.runs.identity import Change, read_identity
from tests.helpers.begun_runs import SMALL, checkpoint, images

FILES = ("recipe.yaml", "identity.json", "state.json")


def content(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in FILES]


def edit(run: Path, old: str, new: str) -> None:
    text = (run / "recipe.yaml").read_text()
    assert text.count(old) == 1
    (run / "recipe.yaml").write_text(text.replace(old, new))


def accepted(run: Path) -> list[tuple[int, list[str]]]:
    recorded = read_identity(run)
    assert recorded is not None
    return [(entry.step, [str(change) for change in entry.changes]) for entry in recorded.accepted]


def lr_of(run: Path) -> float:
    return load_recipe(run / "recipe.yaml")[0].optimizer.lr


def test_what_is_typed_is_meant(started: list[list[str]], kilobatch: Callable, run: Path):
    done = kilobatch("resume", "r", "optimizer.lr=0.03", "seed=7")
    assert done.code == 130 and len(started) == 1
    assert accepted(run) == [(3, ["optimizer.lr: 0.003, now 0.03", "run.seed: 0, now 7"])]
    recipe = load_recipe(run / "recipe.yaml")[0]
    assert (recipe.optimizer.lr, recipe.run.seed) == (0.03, 7)
    assert kilobatch("resume", "r").code == 130 and len(started) == 2  # it is the run's recipe now
    before = content(run)[:2]
    assert kilobatch("resume", "r", "seed=7").code == 130 and content(run)[:2] == before


def test_what_else_has_changed_is_refused(started: list[list[str]], kilobatch: Callable, run: Path):
    edit(run, "  lr: 0.003\n", "  lr: 0.004\n")
    before = content(run)
    done = kilobatch("resume", "r", "seed=7")
    assert done.code == 2 and not started and content(run) == before
    assert "optimizer.lr: 0.003, now 0.004\n" in done.err and "run.seed" not in done.err
    assert "kilobatch resume runs/r --accept-changes seed=7\n" in done.err
    assert kilobatch("resume", "r", "--accept-changes", "seed=7").code == 130
    assert accepted(run) == [(3, ["optimizer.lr: 0.003, now 0.004", "run.seed: 0, now 7"])]


def test_the_images_that_are_typed_are_meant_and_no_others(started: list[list[str]], kilobatch: Callable, run: Path):
    images("test.npz", 5)
    done = kilobatch("resume", "r", "data.train=npz:test.npz")
    assert done.code == 2 and "images of data.test" in done.err and "images of data.train" not in done.err
    images("test.npz", 1)
    assert kilobatch("resume", "r", "data.train=npz:test.npz").code == 130
    assert [names[0].partition(":")[0] for _, names in accepted(run)] == ["images of data.train"]
    assert load_recipe(run / "recipe.yaml")[0].data.train == f"npz:{Path.cwd()}/test.npz"


@pytest.mark.parametrize("again", [["optimizer.lr=0.03"], ["--accept-changes"]])
def test_a_kill_between_the_two_writes_is_understood(
    again: list[str],
    started: list[list[str]],
    kilobatch: Callable,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    def killed(*arguments: object) -> None:
        raise SystemExit(137)

    with monkeypatch.context() as patched:
        patched.setattr(changes, "record_accepted", killed)
        assert kilobatch("resume", "r", "optimizer.lr=0.03").code == 137
    assert (lr_of(run), accepted(run)) == (0.03, [])
    done = kilobatch("resume", "r")
    assert done.code == 2 and "optimizer.lr: 0.003, now 0.03\n" in done.err and not started
    assert kilobatch("resume", "r", *again).code == 130
    assert accepted(run) == [(3, ["optimizer.lr: 0.003, now 0.03"])]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["encoder.width=4"], "can go on with encoder.width: 2, now 4; put the old value back"),
        (["engine.precision=fp16"], "can go on with engine.precision: fp32, now fp16"),
        (["method.dim=16"], r"can go on with method.dim: 128, now 16: head.* would be .*16.*, and is .*128"),
        (["data.batch=2"], "have 2 steps, and would now have 4"),
        (["data.batch=3"], "data.batch 3 does not divide over 2 workers"),
        (["optimizer.lr"], "is not of the form section.key=value"),
        (["optimizer.lrr=1"], "did you mean 'lr'?"),
        (["run.folder=elsewhere"], "stays where it is; for a run of another name: kilobatch branch"),
    ],
)
def test_refused_before_anything_is_written(
    words: list[str], says: str, started: list[list[str]], kilobatch: Callable, run: Path
):
    checkpoint(run, 4, steps_per_epoch=2)
    before = content(run)
    for more in ([], ["--cluster", "local", "--workers-per-node", "2"]):
        done = kilobatch("resume", "r", *words, *(more or ["--workers", "2"]))
        assert done.code == 2 and not started and content(run) == before
        with pytest.raises(UserError, match=says):
            raise UserError(done.err)


@pytest.mark.parametrize(
    ("method", "words", "images_of", "says"),
    [
        ("instance_discrimination", ["--accept-changes"], (9, 2), "images of data.train: .*bank.rows would be .9, 128"),
        (
            "finetune",
            ["--accept-changes"],
            (8, 3),
            "classes of data.train: .*classifier.weight would be .3, .* is .2, ",
        ),
        ("moco", ["method.queue.placement=sharded"], (8, 2), "placement: null, now sharded.* each rank its share, and"),
    ],
)
def test_what_only_the_data_or_the_place_gives_another_shape_is_refused_before_anything_is_written(
    method: str, words: list[str], images_of: tuple[int, int], says: str, kilobatch: Callable, run: Path
):
    """With as many steps in an epoch as before."""
    options = ["evaluate.final=[]", "evaluate.every_epochs=0", *(["data.views.count=1"] * (method != "moco"))]
    options += ["method.queue.length=8"] * (method == "moco")
    recipe = resolve_recipe("demo", [*SMALL, f"method.name={method}", *options])
    other = run_folder.create_run(recipe.run.model_copy(update={"name": "other"}), "demo", recipe.dump_yaml(), 1)
    changes.begin_or_compare(other, recipe, prepare_data(recipe))
    checkpoint(other, 3, steps_per_epoch=2)
    run_folder.set_status(other, "interrupted", 1)
    samples, classes = images_of
    pixels = np.random.default_rng(0).integers(0, 256, (samples, 8, 8, 3), np.uint8)
    labels = np.arange(samples) % classes
    np.savez("train.npz", images=pixels, labels=labels, class_names=["ant", "bee", "cat"][:classes])
    before = content(other)
    done = kilobatch("resume", "other", *words)
    assert done.code == 2 and content(other) == before
    with pytest.raises(UserError, match=f"no checkpoint of runs/other can go on with .*{says}"):
        raise UserError(done.err)


@pytest.mark.parametrize("reason", [UserError("it is away"), OSError(28, "it is away", "job.json")])
@pytest.mark.parametrize("where", [(submit, "queue_runs"), (code_snapshot, "take_snapshot")])
def test_a_job_that_is_refused_leaves_all_as_it_was(
    where: tuple[object, str], reason: Exception, kilobatch: Callable, run: Path, monkeypatch: pytest.MonkeyPatch
):
    before = content(run)

    def refuse(*arguments: object, **options: object) -> list[str]:
        assert (lr_of(run), len(accepted(run))) == (0.03, 1)
        raise reason

    words = ["resume", "r", "--cluster", "local", "optimizer.lr=0.03"]
    with monkeypatch.context() as patched:
        patched.setattr(*where, refuse)
        assert "it is away" in kilobatch(*words).err and content(run) == before
    assert not list((run / "code").glob("*"))
    monkeypatch.setattr(submit, "queue_runs", lambda *arguments, **options: ["1"])
    assert "optimizer.lr: 0.003, now 0.03" in kilobatch(*words).out
    assert lr_of(run) == 0.03 and len(accepted(run)) == 1


@pytest.mark.parametrize("stepped", [False, True])
def test_workers_that_refuse_the_changes_before_a_step_leave_all_as_it_was(
    stepped: bool, kilobatch: Callable, run: Path, monkeypatch: pytest.MonkeyPatch
):
    before = content(run)
    refused = RunOutcome("refused", 0, lines=["kilobatch: no checkpoint fits"], stepped=stepped)
    monkeypatch.setattr(launcher, "run_workers", lambda *arguments, **options: refused)
    done = kilobatch("resume", "r", "optimizer.lr=0.03")
    assert done.code == 2
    if stepped:
        assert (lr_of(run), len(accepted(run)), run_folder.status(run)) == (0.03, 1, "failed")
    else:
        assert content(run) == before and "runs/r is as it was before this command" in done.err


def test_a_run_that_is_trained_is_not_changed(kilobatch: Callable, run: Path):
    before = content(run)
    with run_folder.locked(run):
        for more in ([], ["--cluster", "local"]):
            done = kilobatch("resume", "r", "optimizer.lr=0.03", *more)
            assert done.code == 2 and "is running" in done.err and content(run) == before


def test_data_that_have_moved(started: list[list[str]], kilobatch: Callable, run: Path, tmp_path: Path):
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("npz:", f"npz:{tmp_path}/"))
    identity = (run / "identity.json").read_bytes()
    (tmp_path / "new").mkdir()
    for name in ("train.npz", "test.npz"):
        (tmp_path / name).rename(tmp_path / "new" / name)
    for command in (["resume", "r"], ["eval", "r", "--knn"], ["resume", "r", "--cluster", "local"]):
        done = kilobatch(*command)
        assert done.code == 2 and f"{tmp_path}/train.npz does not exist; put it back" in done.err
        assert f"kilobatch {command[0]} runs/r --data-root {tmp_path}=NEW" in done.err
    assert kilobatch("eval", "r", "--knn", "--data-root", f"{tmp_path}={tmp_path}/new").code == 130
    assert f'data.test="npz:{tmp_path}/new/test.npz"' in started[-1]
    for _ in range(2):  # as after a kill: the same command again
        done = kilobatch("resume", "r", "--data-root", f"{tmp_path}=new")
        assert done.code == 130, done.err
        assert load_recipe(recipe)[0].data.train == f"npz:{tmp_path}/new/train.npz"
        assert (run / "identity.json").read_bytes() == identity
    assert kilobatch("resume", "r").code == 130
    images("new/train.npz", 9)
    (tmp_path / "new").rename(tmp_path / "newer")
    before = content(run)
    done = kilobatch("resume", "r", "--data-root", f"{tmp_path}/new={tmp_path}/newer")
    assert done.code == 2 and "images of data.train: SHA-256" in done.err and content(run) == before


def test_a_data_root_that_leads_nowhere_is_refused(run: Path, tmp_path: Path):
    recipe, _ = load_recipe(run / "recipe.yaml", ["data.labels.list=/lists/some.txt", f"data.test={tmp_path}/b.beton"])
    assert moved_data(recipe, [f"/lists={tmp_path}"]) == [f'data.labels.list="{tmp_path}/some.txt"']
    assert moved_data(recipe, [f"{tmp_path}/b.beton={tmp_path}"]) == [f'data.test="{tmp_path}"']
    assert moved_data(recipe, [f"/elsewhere={tmp_path}"]) == []  # two of them lie there
    for root, says in {
        "/lists": "is not of the form OLD=NEW",
        "/lists=/nowhere": "/nowhere does not exist; name the folder",
        f"/list={run}": r"no data of this run lie in /list \(data.train .*train.npz, data.test .*b.beton, data.labels",
    }.items():
        with pytest.raises(UserError, match=says):
            moved_data(recipe, [root])


def test_a_pipeline_and_its_stages(kilobatch: Callable, run: Path):
    """Changes are of one stage; a stage that others began with gets no more epochs."""
    top = Path("runs/pipe")
    top.mkdir()
    run.rename(top / "pretrain")
    for number, stage in enumerate(("finetune", "distill")):
        (top / stage / "checkpoints").mkdir(parents=True)
        (top / stage / "recipe.yaml").write_bytes((top / "pretrain" / "recipe.yaml").read_bytes())
        checkpoint(top / stage, 1 + number)
    Pipeline(recipes=dict.fromkeys(("pretrain", "finetune", "distill"), "demo")).write(top)
    done = kilobatch("resume", "pipe", "optimizer.lr=0.03")
    assert done.code == 2 and "is for one run; name a stage of runs/pipe, such as runs/pipe/pretrain" in done.err
    checkpoint(top / "pretrain", 4, steps_per_epoch=2)
    run_folder.set_status(top / "pretrain", "finished", 1)
    done = kilobatch("resume", "pipe/pretrain", "schedule.epochs=200")
    assert done.code == 2 and "runs/pipe/finetune has begun with its weights" in done.err
    assert "kilobatch branch runs/pipe/pretrain NEW" in done.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["schedule.epochs=240"],
            [
                "schedule.epochs is 240 now, and was 120",
                "cosine over 240 instead of 120 epochs: the learning rate at step 4 stays at 0.0012",  # of the warm-up
            ],
        ),
        (["optimizer.lr=0.006"], ["cosine: the learning rate at step 4 goes from 0.0012 to 0.0024"]),
        (
            ["schedule.name=constant", "schedule.warmup_epochs=0"],
            ["constant instead of cosine: the learning rate at step 4 goes from 0.0012 to 0.003"],
        ),
        (
            ["schedule.epochs=4", "schedule.warmup_epochs=0"],  # the cosine is at its half
            ["cosine over 4 instead of 120 epochs: the learning rate at step 4 goes from 0.0012 to 0.0015"],
        ),
        (["schedule.epochs=2", "schedule.warmup_epochs=0"], ["step 4 of 4 is done: it ends at once"]),
        (["optimizer.weight_decay=0.1"], []),
    ],
)
def test_the_schedule_is_said(words: list[str], says: list[str], run: Path):
    checkpoint(run, 4, steps_per_epoch=2)
    recipe, _ = load_recipe(run / "recipe.yaml", words)
    found = [Change(name=word.partition("=")[0], old="", new="") for word in words]
    lines = [*describe_schedule(run, recipe, found)]
    assert bool(lines) == bool(says), lines
    for part in says:
        assert part in "\n".join(lines)
