"""Records, evaluations and checkpoints of a run that a refused command has changed are put back."""

from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.runs.former_records import FormerRecords, put_back_if_refused
from kilobatch.launch.schedulers.scheduler import NoAnswer
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from tests.helpers.sample_checkpoints import save


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (4, 8, 12):
        save(tmp_path / "checkpoints", 1, step, CheckpointOptions(keep_last=9))
    for name in ("recipe.yaml", "state.json", "evaluation.json", "metrics.jsonl", "identity.json"):
        (tmp_path / name).write_text(f"{name} as it was")
    return tmp_path


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def change(run: Path, former: FormerRecords) -> None:
    """As a resume from an earlier step, with changes, until its workers refuse it."""
    assert former.set_newer_aside(4)
    (run / "recipe.yaml").write_text("other")
    (run / "identity.json").unlink()
    (run / "cancelled").touch()
    (run / "evaluation.json").rename(run / "evaluation-step-00000012.json")
    (run / "metrics.jsonl").write_text("cut off")


def test_all_is_as_before(run: Path) -> None:
    before = files(run)
    former = FormerRecords(run)
    assert not former.put_back() and files(run) == before
    change(run, former)
    assert former.put_back() and files(run) == before
    assert not (run / "checkpoints" / "newer-than-00000004").exists()
    former = FormerRecords(run)
    (run / "state.json").write_text("failed")
    assert not former.put_back() and files(run) == before, "what a run is has not changed"


@pytest.mark.parametrize("reason", [UserError("no"), OSError(28, "No space left on device")])
def test_a_refusal_puts_it_back_and_a_missing_answer_does_not(run: Path, reason: Exception) -> None:
    before = files(run)
    with pytest.raises(type(reason)), put_back_if_refused(former := FormerRecords(run)):
        change(run, former)
        raise reason
    assert files(run) == before
    with pytest.raises(NoAnswer), put_back_if_refused(former := FormerRecords(run)):
        change(run, former)
        raise NoAnswer("the job may come")
    assert (run / "recipe.yaml").read_text() == "other"
