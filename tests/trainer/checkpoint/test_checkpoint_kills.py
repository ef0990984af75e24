"""A checkpoint is whole or absent when ranks are killed at any moment, ranks fail, or the disk is full."""

import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kilobatch.data.errors import UserError
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import Saved, newest, open_saved
from kilobatch.trainer.checkpoint.shard import Piece
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.ranks import heartbeat
from tests.helpers.process_groups import PRELOAD
from tests.helpers.sample_checkpoints import OPTIONS, pieces


def state_at(step: int) -> Tensor:
    return torch.arange(500_000, dtype=torch.int32) * step


def save_for_ever(folder: Path, rank: int, world: int, first: int, barrier) -> None:
    torch.set_num_threads(1)
    checkpoints = Checkpoints(folder, CheckpointOptions(keep_last=2), rank, world)
    barrier.wait()
    for step in range(first, first + 1000):
        own = Piece.of(torch.tensor([step, rank]), own=True)
        checkpoints.save(step, {"w": Piece.of(state_at(step)), "mine": own}, {"step": step})


def assert_whole(path: Path, world: int) -> Saved:
    saved = open_saved(path)
    assert saved.meta["step"] == saved.step and torch.equal(saved.whole("w"), state_at(saved.step))
    assert [saved.own("mine", rank).tolist() for rank in range(world)] == [[saved.step, r] for r in range(world)]
    return saved


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """20 times: one or both of two ranks killed while they save without pause. Every checkpoint is whole, and none is
    lost."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    dice, reached, cut_short, world = random.Random(1), 0, 0, 2
    for kill in range(20):
        barrier = context.Barrier(world + 1)
        ranks = [
            context.Process(target=save_for_ever, args=(tmp_path, rank, world, reached + 1, barrier))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        barrier.wait(60)
        time.sleep(dice.uniform(0.02, 0.4))
        victims = [process.pid for process in ranks] if kill % 2 else [dice.choice(ranks).pid]
        for pid in victims:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        time.sleep(dice.choice([0, 0.05]))  # the survivor goes on for a moment, until it, too, is stopped
        for process in ranks:
            process.kill()
            process.join()
        cut_short += bool(list(tmp_path.glob(".tmp-step-*")))
        for path in tmp_path.glob("step-*"):
            assert_whole(path, world)
        if path := newest(tmp_path, pytest.fail):
            assert (step := assert_whole(path, world).step) >= reached
            reached = step
    assert reached >= 10 and cut_short >= 5, (reached, cut_short)
    Checkpoints(tmp_path, CheckpointOptions(), 0, world)
    assert not list(tmp_path.glob(".*"))


def test_a_missing_rank_stops_the_others_in_time(tmp_path: Path) -> None:
    options = CheckpointOptions(timeout_minutes=0.005)
    ranks = [Checkpoints(tmp_path, options, rank, 3) for rank in range(3)]
    for rank in (0, 1):
        ranks[rank].save(4, pieces(rank, 3), {})
    started = time.monotonic()
    for rank in (0, 1):
        with pytest.raises(UserError, match="rank-00002-of-00003.safetensors was not written within 0.005 minutes"):
            ranks[rank].close()
    assert time.monotonic() - started < 60  # by default they would wait for half an hour
    assert newest(tmp_path, print) is None


def test_waiting_for_a_writer_is_no_hang_until_its_own_limit_has_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    monkeypatch.setattr(heartbeat, "_PIPE", str(theirs))
    waiting = Checkpoints(tmp_path, CheckpointOptions(timeout_minutes=0.05), 0, 2)
    waiting.save(4, pieces(0, 2), {})
    with pytest.raises(UserError, match="was not written within"):
        waiting.close()
    beats = os.read(ours, 100)
    assert len(beats) >= 3 and heartbeat.PACE not in beats
    os.close(ours)
    os.close(theirs)


def test_a_failing_rank_is_named_on_every_rank(tmp_path: Path) -> None:
    options = CheckpointOptions(every_steps=1)
    ranks = [Checkpoints(tmp_path, options, rank, 3) for rank in range(3)]
    (tmp_path / ".tmp-step-00000004/rank-00001-of-00003.safetensors").mkdir(parents=True)  # in its file's place
    for rank, checkpoints in enumerate(ranks):
        checkpoints.save(4, pieces(rank, 3), {})
    for checkpoints in ranks:
        assert checkpoints._writer is not None
        checkpoints._writer.join(10)
    for rank, checkpoints in enumerate(ranks):
        prefix = "" if rank == 1 else "rank 1: "
        with pytest.raises(UserError, match=f"^{prefix}the checkpoint of step 4 could not be written.*directory"):
            checkpoints.due_by_steps(5)
        with pytest.raises(UserError):
            checkpoints.save(5, pieces(rank, 3), {})


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount the small file system that this test fills")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(folder: Path) -> None:
    ranks = [Checkpoints(folder, OPTIONS, rank, 2) for rank in range(2)]
    for checkpoints in ranks:
        checkpoints.save(1, {"w": Piece.of(torch.ones(80_000))}, {})  # 0.3 MB
    for checkpoints in ranks:
        checkpoints.save(2, {"w": Piece.of(torch.ones(800_000))}, {})  # 3 MB
    for checkpoints in ranks:
        with pytest.raises(
            UserError, match="step 2 could not be written: .*no room left.*; earlier ones are whole: step-0"
        ):
            checkpoints.close()
    left = [path.name for path in folder.glob(".tmp-step-00000002/*")]
    assert not [name for name in left if name.endswith("safetensors")]  # the room that it took is free again
    assert [name for name in left if name.endswith("failed")]  # enough to tell the others
    reports: list[str] = []
    path = newest(folder, reports.append)
    assert path is not None and path.name == "step-00000001" and not reports


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(small_disk: Path) -> None:
    fill(small_disk)
    Checkpoints(small_disk, OPTIONS, 0, 2)  # the next start frees what the failed one took
    assert shutil.disk_usage(small_disk).free > 500_000


def fill_within_limit(folder: Path) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    fill(folder)


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    """The same without root: the kernel refuses to let a file grow."""
    process = multiprocessing.get_context("forkserver").Process(target=fill_within_limit, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


def test_a_read_only_folder_is_refused(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk, OPTIONS, 0, 1)
    checkpoints.save(1, {"w": Piece.of(torch.ones(3))}, {}, wait=True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=f"no checkpoint can be written in {small_disk}: it may not be written to"):
        Checkpoints(small_disk, OPTIONS, 0, 1)
    with pytest.raises(
        UserError, match="step 2 could not be written: .*Read-only.*; earlier ones are whole: step-00000001"
    ):
        checkpoints.save(2, {"w": Piece.of(torch.ones(3))}, {}, wait=True)
    path = newest(small_disk, pytest.fail)
    assert path is not None and path.name == "step-00000001"


def test_an_error_that_ends_the_run_is_not_hidden(tmp_path: Path) -> None:
    options = CheckpointOptions(timeout_minutes=0.003)
    with pytest.raises(ZeroDivisionError), Checkpoints(tmp_path, options, 0, 2) as checkpoints:
        checkpoints.save(1, pieces(0, 2), {})  # the other rank is gone
        raise ZeroDivisionError
