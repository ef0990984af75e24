"""Ranks are forked from a process that has torch already; nothing of it may show in them but the time."""

import os
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from tests.ranks.groups import run_ranks
from trainer.lars import LARS
from trainer.uncompiled import spare_the_compiler

MAKERS: list[Callable[..., Optimizer]] = [LARS, SGD, AdamW]


def told() -> dict[str, object]:
    """Of a rank that has done nothing yet."""
    fork_without_gpu = torch.cuda._is_in_bad_fork()
    return {
        "variable": os.environ.get("KILOBATCH_TOLD"),
        "heavy": [name for name in ("triton", "numba", "deepspeed", "torch._dynamo") if name in sys.modules],
        "fork without GPU": fork_without_gpu,
        "threads": torch.get_num_threads(),
    }


def trained() -> list[torch.Tensor]:
    """Weights after a few steps by each optimizer, and one more from its saved state."""
    found = []
    for make in MAKERS:
        torch.manual_seed(0)
        net = nn.Linear(5, 3)
        for _ in range(2):
            optimizer = make(net.parameters(), lr=0.1)
            for _ in range(3):
                net(torch.ones(2, 5)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            optimizer.load_state_dict(optimizer.state_dict())
        found.append(net.weight.detach().clone())
    return found


def trained_without_the_compiler() -> tuple[list[torch.Tensor], bool]:
    spare_the_compiler()
    return trained(), "torch._dynamo" in sys.modules


def test_a_rank_has_its_callers_environment_and_nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"heavy": [], "fork without GPU": False, "threads": 1}
    for said in ("before", "after"):  # the process that ranks are forked from is older than the second
        monkeypatch.setenv("KILOBATCH_TOLD", said)
        assert run_ranks(1, told) == [expected | {"variable": said}]


def test_optimizers_do_the_same_without_the_compiler() -> None:
    """torch imports its compiler for them otherwise: seconds, in each worker."""
    ((found, imported),) = run_ranks(1, trained_without_the_compiler)
    assert not imported
    for ours, torchs in zip(found, trained(), strict=True):
        assert torch.equal(ours, torchs)
