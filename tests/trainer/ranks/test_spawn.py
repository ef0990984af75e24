"""Ranks are forked from a process that has imported torch; apart from the time saved, this must change nothing."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.ranks.skip_dynamo import skip_dynamo
from tests.helpers.process_groups import run_ranks

MAKERS: list[Callable[..., Optimizer]] = [LARS, SGD, AdamW]


def process_state() -> dict[str, object]:
    """The state of a rank that has done nothing yet."""
    fork_without_gpu = torch.cuda._is_in_bad_fork()
    return {
        "variable": os.environ.get("KILOBATCH_TEST"),
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
    skip_dynamo()
    return trained(), "torch._dynamo" in sys.modules


def test_a_rank_has_its_callers_environment_and_nothing_heavy(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"heavy": [], "fork without GPU": False, "threads": 1}
    for value in ("before", "after"):  # the second is set after the process that ranks are forked from has started
        monkeypatch.setenv("KILOBATCH_TEST", value)
        assert run_ranks(1, process_state) == [expected | {"variable": value}]


def goes_on(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def test_ranks_end_with_a_caller_that_is_killed(tmp_path: Path) -> None:
    start = "run_ranks(2, goes_on, pathlib.Path(sys.argv[1]))"
    call = f"import sys, pathlib; from tests.trainer.ranks.test_spawn import *; {start}"
    caller = subprocess.Popen([sys.executable, "-c", call, str(tmp_path)])
    within(60, lambda: len(list(tmp_path.iterdir())) == 2)
    caller.kill()
    caller.wait()
    within(60, lambda: not any(psutil.pid_exists(int(rank.name)) for rank in tmp_path.iterdir()))


def within(seconds: float, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_optimizers_do_the_same_without_the_compiler() -> None:
    """Otherwise torch imports its compiler for them, which takes seconds in each worker."""
    ((found, imported),) = run_ranks(1, trained_without_the_compiler)
    assert not imported
    for ours, torchs in zip(found, trained(), strict=True):
        assert torch.equal(ours, torchs)
