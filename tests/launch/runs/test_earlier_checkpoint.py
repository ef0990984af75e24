"""A run goes on from an earlier checkpoint, and the newer ones are kept."""

from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.runs.earlier_checkpoint import check_checkpoint, set_newer_aside
from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from tests.helpers.sample_checkpoints import save


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (4, 8, 12):
        save(tmp_path / "checkpoints", 1, step, CheckpointOptions(keep_last=9))
    (tmp_path / "metrics.jsonl").write_text('{"step": 12}\n')
    return tmp_path


def test_newer_checkpoints_are_set_aside_whole(run: Path) -> None:
    checkpoints = run / "checkpoints"
    assert set_newer_aside(run, 12) is None
    assert set_newer_aside(run, 8) == checkpoints / "newer-than-00000008"
    assert [*list_checkpoints(checkpoints)] == [4, 8]
    save(checkpoints, 1, 12, CheckpointOptions(keep_last=9))
    assert set_newer_aside(run, 8) == checkpoints / "newer-than-00000008-2"
    assert set_newer_aside(run, 4) == checkpoints / "newer-than-00000004"
    for name, step in {"newer-than-00000008": 12, "newer-than-00000008-2": 12, "newer-than-00000004": 8}.items():
        assert [*list_checkpoints(checkpoints / name)] == [step]
        assert (checkpoints / name / "metrics.jsonl").read_text() == '{"step": 12}\n'


def test_a_step_without_a_whole_checkpoint_is_refused(run: Path) -> None:
    check_checkpoint(run, 8)
    with pytest.raises(UserError, match=r"--from 5: .* has no checkpoint of this step; there are: 4, 8, 12$"):
        check_checkpoint(run, 5)
    shard = next((run / "checkpoints" / "step-00000008").glob("rank-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match=r"step-00000008: the checksum of rank-00000"):
        check_checkpoint(run, 8)
