"""Comparison of a method of one's own with itself: what a training calls is called."""

from pathlib import Path

from kilobatch.trainer.layout_parity import KEPT, Subject, layout_rows

METHOD = """
import torch
from torch import nn

from kilobatch.methods import collectives
from kilobatch.methods.method import Method


class Centred(Method):
    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.register_buffer("centre", torch.zeros(encoder.features))

    def before_epoch(self, epoch, features):
        index, rows = features(self.encoder)
        self.centre.copy_(collectives.all_reduce_sum((rows * 2**20).round().long().sum(0)) / 24 / 2**20)

    def embed(self, batch):
        return {"z": self.encoder(batch.views[0][:, 0])}

    def loss(self, z, t, batch):
        assert self.centre.norm() > 0, "the hook was not called"
        return (z["z"] - self.centre).square().sum(1).mean()
"""


def test_the_hook_before_an_epoch_is_called(tmp_path: Path) -> None:
    file = tmp_path / "centred.py"
    file.write_text(METHOD)
    rows = layout_rows(Subject("centred", f"{file}:Centred"), ranks=(1,), precisions=("fp64",))
    assert all(row.ok for row in rows) and {row.name for row in rows} == {"centred", f"centred{KEPT}"}
