"""docs/python.md: its blocks run, one after another, and its losses are those of one process that has the batch."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kilobatch.launch.processes import launcher
from kilobatch.methods import collectives
from tests.helpers import worker_in_process
from tests.helpers.process_groups import run_ranks

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall((ROOT / "docs" / "python.md").read_text("utf-8"))
LOSSES = [block for block in BLOCKS if "def barlow_twins" in block or "def plain_info_nce" in block]


def test_the_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launcher, "run_workers", worker_in_process.run_workers)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in BLOCKS:
        if "import lightning" not in block or importlib.util.find_spec("lightning"):
            exec(compile(block, "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "finished {" in printed and "{'knn/top1': 0." in printed and "(360, " in printed
    assert names["features"].shape == (1, names["table"].features.shape[1])
    assert names["run"].folder == Path("runs/first") and Path("digits.npz").exists()
    assert names["loss"].isfinite() and len(names["loader"]) == 5


def gradients_of(name: str, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The average over ranks of the loss, and this rank's rows of the gradients of that average."""
    names: dict[str, Any] = {}
    for block in LOSSES:
        exec(compile(block, "docs/python.md", "exec"), names)
    mine = [z.chunk(collectives.world_size())[collectives.rank()].clone().requires_grad_() for z in (z1, z2)]
    loss = names[name](*mine)
    one, two = torch.autograd.grad(loss, mine)
    return collectives.mean(loss.detach()), one / collectives.world_size(), two / collectives.world_size()


@pytest.mark.parametrize("name", ["barlow_twins", "plain_info_nce"])
def test_its_losses_are_those_of_one_process(name: str) -> None:
    assert len(LOSSES) == 2
    generator = torch.Generator().manual_seed(0)
    z1 = torch.randn(12, 5, dtype=torch.float64, generator=generator)
    z2 = z1 + torch.randn(12, 5, dtype=torch.float64, generator=generator)
    loss, one, two = gradients_of(name, z1, z2)
    if name == "barlow_twins":  # the authors' code: github.com/facebookresearch/barlowtwins, main.py
        bn = torch.nn.BatchNorm1d(5, affine=False, eps=1e-14).double()
        c = (bn(z1).T @ bn(z2)) / 12
        off = c - c.diagonal().diag()
        torch.testing.assert_close(loss, (c.diagonal() - 1).pow(2).sum() + 0.005 * off.pow(2).sum())
    ranks = run_ranks(2, gradients_of, name, z1, z2)
    torch.testing.assert_close(ranks[0][0], loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]), one, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(torch.cat([rank[2] for rank in ranks]), two, rtol=1e-10, atol=1e-12)
