"""The record of what a run is: written when it begins, compared when it goes on or is evaluated, changed knowingly."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.jobs import submit
from kilobatch.launch.recipes import changes
from kilobatch.launch.recipes.data import PreparedData, prepare_data
from kilobatch.launch.recipes.recipe import Recipe, load_recipe
from kilobatch.launch.runs.identity import read_identity, write_identity
from tests.helpers.begun_runs import NAMES, checkpoint, images


def now(folder: Path, *overrides: str) -> tuple[Path, Recipe, PreparedData]:
    recipe = load_recipe(folder / "recipe.yaml", overrides)[0]
    return folder, recipe, prepare_data(recipe)


def test_a_run_records_what_it_is(run: Path):
    recorded, (_, recipe, data) = read_identity(run), now(run)
    assert recorded is not None and data.test is not None
    assert (recorded.train.sha256, recorded.test and recorded.test.sha256) == (data.train.sha256, data.test.sha256)
    assert (recorded.train.samples, recorded.train.classes) == (8, NAMES)
    assert recorded.recipe == recipe.model_dump(mode="json")
    assert {*recorded.versions} == {"kilobatch", "torch", "deepspeed", "ffcv", "python"}
    assert (recorded.step, recorded.references, recorded.accepted) == (0, {}, [])
    written = (run / "identity.json").read_bytes()
    assert changes.begin_or_compare(*now(run)) == frozenset()
    assert (run / "identity.json").read_bytes() == written


CHANGED: dict[str, tuple[Callable[[], object], list[str], list[str]]] = {
    "options": (
        lambda: None,
        ["data.batch=2", "optimizer.lr=0.03", "run.seed=7"],
        ["data.batch: 4, now 2", "run.seed: 0, now 7", "optimizer.lr: 0.003, now 0.03"],
    ),
    "a part that is left out": (
        lambda: None,
        ["data.views.jitter=null"],
        ["data.views.jitter: {brightness: 0.4, ", ", now null"],
    ),
    "another method": (
        lambda: None,
        ["method.name=moco"],
        ["method.name: simclr, now moco", "method.queue: absent, now {"],
    ),
    "training images": (lambda: images("train.npz", 2), [], ["images of data.train: SHA-256 ", "…, now "]),
    "test images": (lambda: images("test.npz", 2), [], ["images of data.test: SHA-256 "]),
    "no test images": (lambda: None, ["data.test=null"], ["data.test: 8 images of SHA-256 ", "now none"]),
    "order of classes": (
        lambda: (images("train.npz", 0, ["bee", "ant"]), images("test.npz", 1, ["bee", "ant"])),
        [],
        ["classes of data.train: 'ant' (class 0 of 2), now 'bee' (class 0 of 2)", "classes of data.test: 'ant'"],
    ),
    "the order": (
        lambda: None,
        ["data.order.long_tailed.ratio=2"],
        ["data.order: null, now {class_balanced: false", "labelled images of data.train: SHA"],
    ),
    "labelled images": (
        lambda: None,
        ["data.labels.share=0.5"],
        ["labels.share: 1.0, now 0.5", "labelled images of data.train: SHA"],
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_change_is_listed_with_both_values(case: str, run: Path):
    change, overrides, expected = CHANGED[case]
    change()
    with pytest.raises(UserError) as refused:
        changes.begin_or_compare(*now(run, *overrides))
    message = str(refused.value)
    missing = [words for words in [*expected, "from step 3 on: kilobatch resume"] if words not in message]
    assert not missing, f"{message}: lacks {missing}"


def test_images_count_and_not_where_they_lie(run: Path, tmp_path: Path):
    (tmp_path / "moved").mkdir()
    Path("train.npz").rename("moved/train.npz")
    assert changes.changes_of(*now(run, "data.train=npz:moved/train.npz")) == []


def test_accepted_changes_are_written_with_their_step(run: Path):
    before = read_identity(run)
    assert before is not None
    images("train.npz", 2)
    changed = now(run, "run.seed=7")
    changes.record_accepted(*changed, changes.changes_of(*changed))
    recorded = read_identity(run)
    assert recorded is not None and len(recorded.accepted) == 1
    entry = recorded.accepted[0]
    assert (entry.step, entry.data_sha256) == (3, before.data_sha256)
    assert [change.name for change in entry.changes] == ["run.seed", "images of data.train"]
    assert (recorded.recorded, recorded.train.sha256) == (before.recorded, changed[2].train.sha256)
    assert changes.begin_or_compare(*changed) == {before.data_sha256}  # its checkpoint is of these
    with pytest.raises(UserError, match="run.seed: 7, now 0"):
        changes.begin_or_compare(*now(run))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("encoder.width=4", "can go on with encoder.width: 2, now 4; put the old value back"),
        ("data.batch=2", r"epochs of runs/r have 2 steps, and would now have 4, so that no checkpoint"),
    ],
)
def test_what_no_checkpoint_can_go_on_with_is_not_accepted(override: str, says: str, run: Path):
    checkpoint(run, 4, steps_per_epoch=2)
    changed, written = now(run, override), (run / "identity.json").read_bytes()
    with pytest.raises(UserError, match=says):
        changes.record_accepted(*changed, changes.changes_of(*changed))
    assert (run / "identity.json").read_bytes() == written


def test_a_run_of_an_earlier_version_is_compared_with_its_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]):
    _, recipe, data = now(run)
    (run / "identity.json").unlink()
    checkpoint(run, 5, recipe=recipe.model_dump(mode="json"), images_sha256=data.train.sha256)
    with pytest.raises(UserError, match="run.seed: 0, now 7\n"):
        changes.begin_or_compare(*now(run, "run.seed=7"))
    assert read_identity(run) is None
    changes.begin_or_compare(*now(run))
    assert "began before runs recorded what they are" in capsys.readouterr().err
    recorded = read_identity(run)
    assert recorded is not None and (recorded.step, recorded.train.classes) == (5, NAMES)
    changes.begin_or_compare(*now(run))
    assert capsys.readouterr().err == ""


def test_other_versions_are_a_warning(run: Path, capsys: pytest.CaptureFixture[str]):
    recorded = read_identity(run)
    assert recorded is not None
    write_identity(run, recorded.model_copy(update={"versions": {**recorded.versions, "torch": "1.0"}}))
    changes.begin_or_compare(*now(run))
    assert "began with torch 1.0, now 2" in capsys.readouterr().err


def test_a_damaged_record_is_refused(run: Path):
    (run / "identity.json").write_text('{"recorded": 1}')
    with pytest.raises(UserError, match=r"identity.json is damaged \(recorded: .*put a copy back, or remove it"):
        changes.begin_or_compare(*now(run))


def test_resume_refuses_and_accepts(started: list[list[str]], kilobatch: Callable, run: Path):
    recipe = run / "recipe.yaml"
    text, written = recipe.read_text(), (run / "identity.json").read_bytes()
    assert kilobatch("resume", "r").code == 130 and len(started) == 1
    recipe.write_text(text.replace("seed: 0\n  device", "seed: 7\n  device"))
    state = (run / "state.json").read_bytes()
    for words in (["resume", "r"], ["resume", "r", "--cluster", "local"]):
        refused = kilobatch(*words)
        assert refused.code == 2 and "run.seed: 0, now 7\n" in refused.err and "--accept-changes" in refused.err
    assert len(started) == 1
    assert ((run / "state.json").read_bytes(), (run / "identity.json").read_bytes()) == (state, written)
    accepted = kilobatch("resume", "r", "--accept-changes")
    assert accepted.code == 130 and "changed from step 3 on:\n  run.seed: 0, now 7" in accepted.out
    assert kilobatch("resume", "r").code == 130 and len(started) == 3
    assert json.loads((run / "identity.json").read_text())["accepted"][0]["changes"] == [
        {"name": "run.seed", "old": "0", "new": "7"}
    ]


def test_a_job_accepts_when_it_is_queued(kilobatch: Callable, run: Path, monkeypatch: pytest.MonkeyPatch):
    images("train.npz", 2)
    written = (run / "identity.json").read_bytes()

    def refuse(*arguments: object, **options: object) -> list[str]:
        raise UserError("the scheduler is away")

    monkeypatch.setattr(submit, "queue_runs", refuse)
    assert "scheduler is away" in kilobatch("resume", "r", "--cluster", "local", "--accept-changes").err
    assert (run / "identity.json").read_bytes() == written
    monkeypatch.setattr(submit, "queue_runs", lambda *arguments, **options: ["1"])
    assert "images of data.train" in kilobatch("resume", "r", "--cluster", "local", "--accept-changes").out
    recorded = read_identity(run)
    assert recorded is not None and [entry.step for entry in recorded.accepted] == [3]


def test_eval_refuses_images_that_the_run_did_not_see(started: list[list[str]], kilobatch: Callable, run: Path):
    assert kilobatch("eval", "r", "--knn").code == 130
    images("test.npz", 2)
    refused = kilobatch("eval", "r", "--knn")
    assert refused.code == 2 and "images of data.test: SHA-256" in refused.err and "--test npz:test.npz" in refused.err
    assert kilobatch("eval", "r", "--knn", "--test", "npz:test.npz").code == 130
    images("train.npz", 3)
    refused = kilobatch("eval", "r", "--knn", "--test", "npz:test.npz")
    assert refused.code == 2 and "images of data.train: SHA-256" in refused.err and "--train npz:" in refused.err
    assert kilobatch("eval", "r", "--knn", "--test", "npz:test.npz", "--train", "npz:train.npz").code == 130
    assert started[-1][-6:-2] == ["--train", "npz:train.npz", "--test", "npz:test.npz"]
    (run / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace("width: 2", "width: 4"))
    refused = kilobatch("eval", "r", "--knn", "--test", "npz:test.npz", "--train", "npz:train.npz")
    assert refused.code == 2 and "recipe.yaml has changed since the run began: encoder.width: 2, now 4" in refused.err
