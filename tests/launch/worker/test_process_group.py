"""This worker's place from variables of torchrun or SLURM: a single worker without them, refused with some of them."""

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from kilobatch.data.errors import UserError
from kilobatch.launch.worker.devices import pick_device
from kilobatch.launch.worker.process_group import NO_LIMIT, group_timeout, world_from_environment

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
WATCHDOG = "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


SRUN = {  # the seventh of eight tasks of `srun -N 3`, as SLURM 22.05 sets them
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),2",
    "SLURM_STEP_NODELIST": "n[0-2]",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def set_environment(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in (*TORCHRUN, *ADDRESS, WATCHDOG, *[name for name in os.environ if name.startswith("SLURM_")]):
        monkeypatch.setenv(name, "")  # so that what the code under test sets is removed at the end
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_torchrun(monkeypatch: pytest.MonkeyPatch):
    set_environment(monkeypatch, **TORCHRUN, **ADDRESS)
    world = world_from_environment("cpu")
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)
    assert world.device == torch.device("cpu")


@pytest.fixture
def torchs_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves torch's own timeouts as they are for other tests."""
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):
        monkeypatch.setattr(distributed_c10d, name, getattr(distributed_c10d, name))


@pytest.mark.usefixtures("torchs_timeouts")
def test_a_single_worker_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch):
    set_environment(monkeypatch)
    world = world_from_environment("cpu")
    assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
    world.connect(timedelta(minutes=1))
    try:
        total = torch.ones(1)
        dist.all_reduce(total)
        assert (dist.get_world_size(), total.item(), dist.get_backend()) == (1, 1.0, "gloo")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("stall_minutes", [0.1, 1, 30, 600, None])
def test_the_timeout_stands_clearly_above_the_launchers(stall_minutes: float | None):
    timeout = group_timeout(stall_minutes)
    assert timeout >= timedelta(minutes=30) + timedelta(minutes=stall_minutes or 0)
    assert timeout >= 2 * timedelta(minutes=stall_minutes or 0)
    assert timeout <= NO_LIMIT < timedelta(milliseconds=2**31), "longer than the 32 bits of a socket's timeout"


@pytest.mark.usefixtures("torchs_timeouts")
@pytest.mark.parametrize("set_by_user", [None, "77"])
def test_groups_that_are_made_later_have_the_same_timeout(set_by_user: str | None, monkeypatch: pytest.MonkeyPatch):
    given = {} if set_by_user is None else {WATCHDOG: set_by_user}
    set_environment(monkeypatch, **given)
    world_from_environment("cpu").connect(group_timeout(None))
    try:
        group = dist.new_group([0])
        assert isinstance(group, dist.ProcessGroup)
        for each in (group, dist.group.WORLD):
            assert each is not None
            assert each._get_backend(torch.device("cpu")).options._timeout == NO_LIMIT
        assert distributed_c10d._get_default_timeout("nccl") == NO_LIMIT
        assert os.environ[WATCHDOG] == (set_by_user or str(7 * 24 * 3600))
    finally:
        dist.destroy_process_group()


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SLURM's answers to `scontrol show hostnames n[0-2]`, but for the first name, which is to be found."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[0-2]" ] && printf "localhost\\nn1\\nn2\\n"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("scontrol")
def test_srun_without_agents(monkeypatch: pytest.MonkeyPatch):
    set_environment(monkeypatch, **SRUN)
    last = world_from_environment("cpu")
    assert (last.rank, last.size, last.local_rank, last.local_size) == (6, 8, 0, 2)
    address = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    assert address[0] == "localhost"
    set_environment(monkeypatch, **SRUN | {"SLURM_PROCID": "2", "SLURM_LOCALID": "2", "SLURM_NODEID": "0"})
    third = world_from_environment("cpu")
    assert (third.rank, third.size, third.local_rank, third.local_size) == (2, 8, 2, 3)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == address, "all meet at one place"
    set_environment(monkeypatch, **SRUN | {"SLURM_STEP_ID": "1"})
    world_from_environment("cpu")
    assert os.environ["MASTER_PORT"] != address[1], "two steps of a job do not"


def test_variables_of_the_agents_take_precedence_over_slurms(monkeypatch: pytest.MonkeyPatch):
    set_environment(monkeypatch, **SRUN, **TORCHRUN, **ADDRESS)
    assert world_from_environment("cpu").rank == 3


@pytest.mark.parametrize("change", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": "1"}])
def test_slurms_only_task_is_a_single_worker(change: dict[str, str | None], monkeypatch: pytest.MonkeyPatch):
    values = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    set_environment(monkeypatch, **values, **{name: value for name, value in change.items() if value is not None})
    assert world_from_environment("cpu").size == 1
    assert "MASTER_ADDR" not in os.environ


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"SLURM_STEP_NUM_TASKS": None, "SLURM_PROCID": "0"}, "SLURM_NTASKS is 8, but this process was not started by"),
        ({"SLURM_STEP_TASKS_PER_NODE": "3(x3)"}, "contradict each other"),
        ({"SLURM_STEP_TASKS_PER_NODE": "many"}, "it should be like 4(x2),3"),
        ({"SLURM_NODEID": "3"}, "contradict each other"),
        ({"SLURM_LOCALID": "2"}, "LOCAL_RANK=2 of 2"),
        ({"SLURM_PROCID": "8"}, "RANK=8 of WORLD_SIZE=8"),
        ({"SLURM_STEP_NODELIST": "n[0-3]"}, "scontrol does not tell the hosts of n[0-3]"),
    ],
)
@pytest.mark.usefixtures("scontrol")
def test_srun_that_contradicts_itself(change: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch):
    set_environment(monkeypatch, **{name: value for name, value in (SRUN | change).items() if value is not None})
    with pytest.raises(UserError) as refusal:
        world_from_environment("cpu")
    assert message in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, "RANK not"),
        ({"MASTER_ADDR": None, "MASTER_PORT": None}, "MASTER_ADDR, MASTER_PORT not"),
        ({"RANK": "4"}, "RANK=4 of WORLD_SIZE=4"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 of 2"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four'"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_contradictory_variables_are_refused(
    change: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
):
    values = {name: value for name, value in (TORCHRUN | ADDRESS | change).items() if value is not None}
    set_environment(monkeypatch, **values)
    with pytest.raises(UserError) as refusal:
        world_from_environment("cpu")
    assert message in str(refusal.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for cuda where there is none")
def test_cuda_is_not_replaced_by_a_cpu(monkeypatch: pytest.MonkeyPatch):
    set_environment(monkeypatch)
    assert world_from_environment("auto").device.type == "cpu"
    with pytest.raises(UserError, match="run.device is cuda.*use run.device=cpu or auto"):
        world_from_environment("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU here")
def test_gpus_from_slurm_that_torch_cannot_see_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(UserError, match="8 GPUs here, but torch sees none"):
        pick_device("auto", 0)
    assert pick_device("cpu", 0).type == "cpu"
