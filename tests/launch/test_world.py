"""Who this worker is: from torchrun's variables, alone without them, refused with some of them."""

import pytest
import torch
import torch.distributed as dist

from data.refusal import Refusal
from launch.world import world

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def given(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    for name in (*TORCHRUN, *ADDRESS):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_torchrun(monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch, **TORCHRUN, **ADDRESS)
    here = world("cpu")
    assert (here.rank, here.size, here.local_rank, here.local_size) == (3, 4, 1, 2)
    assert here.device == torch.device("cpu")


def test_alone_it_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch)
    here = world("cpu")
    assert (here.rank, here.size, here.local_rank, here.local_size) == (0, 1, 0, 1)
    here.connect()
    try:
        total = torch.ones(1)
        dist.all_reduce(total)
        assert (dist.get_world_size(), total.item(), dist.get_backend()) == (1, 1.0, "gloo")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("change", "told"),
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
def test_refused_rather_than_guessed(change: dict[str, str | None], told: str, monkeypatch: pytest.MonkeyPatch):
    values = {name: value for name, value in (TORCHRUN | ADDRESS | change).items() if value is not None}
    given(monkeypatch, **values)
    with pytest.raises(Refusal) as refusal:
        world("cpu")
    assert told in str(refusal.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for cuda where there is none")
def test_cuda_is_not_replaced_by_a_cpu(monkeypatch: pytest.MonkeyPatch):
    given(monkeypatch)
    assert world("auto").device.type == "cpu"
    with pytest.raises(Refusal, match="run.device is cuda.*use run.device=cpu or auto"):
        world("cuda")
