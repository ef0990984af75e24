"""Projection heads of n layers, and their first layers, which fine-tuning keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.heads import ProjectionHead, hidden_layers

X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def head(layers: int) -> ProjectionHead:
    torch.manual_seed(0)
    made = ProjectionHead(5, 7, 3, "local", layers).double()
    for module in made.modules():
        if isinstance(module, BatchNorm):
            torch.nn.init.normal_(module.weight)
            if module.bias is not None:
                torch.nn.init.normal_(module.bias)
    return made


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_layers(layers: int) -> None:
    """google-research/simclr, model_util.py, projection_head: bias and ReLU in all but the last."""
    made = head(layers)
    state, x = dict(made.named_parameters()), X
    for j in range(layers):
        x = F.linear(x, state.pop(f"layers.{3 * j}.weight"))
        x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * state.pop(f"layers.{3 * j + 1}.weight")
        if j < layers - 1:
            x = (x + state.pop(f"layers.{3 * j + 1}.bias")).relu()
    assert not state and x.shape == (6, 3)
    assert_close(made(X), x)


def test_two_layers_keep_the_names_of_old_checkpoints() -> None:
    assert list(dict(ProjectionHead(5, 7, 3, "global").named_parameters())) == [
        "layers.0.weight",
        "layers.1.weight",
        "layers.1.bias",
        "layers.3.weight",
        "layers.4.weight",
    ]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_first_layers_of_a_head_are_hidden_layers(count: int) -> None:
    made, mine = head(3), hidden_layers(5, 7, count, "local").double()
    mine.load_state_dict(made.layers[: 3 * count].state_dict())
    seen = [X]
    for i in range(2):
        seen.append(made.layers[3 * i : 3 * i + 3](seen[-1]))
    assert_close(mine(X), seen[count])
