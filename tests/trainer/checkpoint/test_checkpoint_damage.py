"""Damaged checkpoints are named, and the newest whole one is used."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.trainer.checkpoint.reader import Damaged, newest, open_saved
from tests.helpers.sample_checkpoints import save


def _truncate(path: Path) -> None:
    shard = path / "rank-00001-of-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)


def _flip(path: Path) -> None:
    shard = path / "rank-00000-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def _delete(path: Path) -> None:
    (path / "rank-00001-of-00002.safetensors").unlink()


def _empty(path: Path) -> None:
    (path / "checkpoint.json").write_text("")


def _half(path: Path) -> None:
    os.truncate(path / "checkpoint.json", 100)


def _remove(path: Path) -> None:
    (path / "checkpoint.json").unlink()


def _edit(path: Path) -> None:
    text = (path / "checkpoint.json").read_text()
    (path / "checkpoint.json").write_text(text.replace('"loss": 0.5', '"loss": 0.6'))


def _other_world(path: Path) -> None:
    other = save(path.parent.parent / "other", 3, 2)
    shutil.copy(other / "checkpoint.json", path)


def _other_step(path: Path) -> None:
    shutil.copy(path.parent / "step-00000001/checkpoint.json", path)


def _foreign(path: Path) -> None:
    (path / "checkpoint.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_truncate, r"rank-00001-of-00002.safetensors has \d+ bytes instead of \d+"),
        (_flip, "checksum of rank-00000-of-00002.safetensors does not match"),
        (_delete, "rank-00001-of-00002.safetensors is missing"),
        (_empty, "checkpoint.json cannot be used: it is empty"),
        (_half, "checkpoint.json cannot be used: it is not JSON"),
        (_remove, "checkpoint.json is missing"),
        (_edit, "checkpoint.json cannot be used: its checksum does not match"),
        (_other_world, "rank-00000-of-00003.safetensors is missing"),
        (_other_step, "checkpoint.json is of step 1"),
        (_foreign, "checkpoint.json cannot be used: it is not a checkpoint's description"),
    ],
)
def test_damage_is_named_and_passed_over(tmp_path: Path, damage: Callable[[Path], None], named: str) -> None:
    folder = tmp_path / "checkpoints"
    good, bad = save(folder, 2, 1, meta={"loss": 0.5}), save(folder, 2, 2, meta={"loss": 0.5})
    damage(bad)
    with pytest.raises(Damaged, match=named):
        open_saved(bad)
    reports: list[str] = []
    assert newest(folder, reports.append) == good
    assert len(reports) == 1 and "step-00000002" in reports[0]
    shutil.rmtree(good)
    with pytest.raises(UserError, match=r"no whole checkpoint in [^\n]*\n.*step-00000002"):
        newest(folder, reports.append)


def test_newest_of_nothing(tmp_path: Path) -> None:
    assert newest(tmp_path / "absent", print) is None
    assert newest(tmp_path, print) is None


def test_a_checkpoint_that_a_training_removes_meanwhile_is_refused_by_name(tmp_path: Path):
    save(tmp_path, 1, 3)
    saved = open_saved(tmp_path / "step-00000003")
    shutil.rmtree(saved.folder)
    with pytest.raises(UserError, match="step-00000003 was removed while it was read, .*; give the command again$"):
        saved.whole("method.conv")
