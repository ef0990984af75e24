"""Encoders of other libraries and of one's own on ranks x chunks: gradients and running statistics are those of one
process, draws included."""

from pathlib import Path
from typing import Any

import pytest

from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.trainer.layout_parity import KEPT, Subject, layout_rows

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout2d(0.2),
            nn.Conv2d(width, 2 * width, 3, 2), nn.SyncBatchNorm(2 * width), nn.GELU(), nn.Dropout(0.3),
        )

    def forward(self, images):
        return self.layers(images)  # a map (N, 2 * width, h, w)

def net(width: int = 4) -> nn.Module:
    return Net(width)
"""


def subject(name: str, side: int, samples: int, **options: Any) -> Subject:
    return Subject(name, encoder=EncoderOptions(name=name, options=options or None), side=side, samples=samples)


def agrees(compared: Subject, ranks: tuple[int, ...] = (1, 2)) -> None:
    rows = layout_rows(compared, ranks=ranks, precisions=("fp64",))
    assert {(row.layout.ranks, row.layout.chunks) for row in rows} >= {(1, 4), (2, 1), (2, 2)}
    wrong = [row for row in rows if not row.ok]
    assert not wrong, [(row.name, row.layout, row.error) for row in wrong]


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "nets.py"
    file.write_text(NETWORK)
    compared = subject(f"{file}:net", 12, 8, width=3)
    agrees(compared)
    norms = {row.layout.norm for row in layout_rows(compared, ranks=(1,), precisions=("fp64",)) if KEPT in row.name}
    assert norms == {"fixed", "global", "local"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("timm/vit_tiny_patch16_224", 48, {"img_size": 48, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}),
        ("timm/convnext_atto", 32, {"drop_path_rate": 0.2}),
        ("timm/regnety_008", 64, {}),
        ("torchvision/resnet18", 64, {}),
    ],
)
def test_networks_of_libraries(name: str, side: int, options: dict[str, Any]) -> None:
    pytest.importorskip(name.partition("/")[0])
    agrees(subject(name, side, 8, **options))
