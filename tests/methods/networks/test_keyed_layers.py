"""Keyed dropout, drop path and noise: what their draws depend on, and what takes a library's place."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.errors import UserError
from kilobatch.data.tensor_rng import sample_keys
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder
from kilobatch.methods.networks import keyed_layers
from kilobatch.methods.networks.keyed_layers import KeyedDropout, KeyedDropPath, KeyedNoise

KEYS = sample_keys(3, 7, torch.arange(12))


def drawn(layer: nn.Module, x: Tensor, keys: Tensor = KEYS, calls: int = 1) -> Tensor:
    """The layer's output at its last call of so many in a chunk."""
    with keyed_layers.drawing(nn.Sequential(layer), keys):
        return [layer(x) for _ in range(calls)][-1]


def noise() -> nn.Module:
    class Noisy(KeyedNoise):
        def forward(self, x: Tensor, std: float | Tensor = 2.0) -> Tensor:
            return super().forward(x, std)

    return Noisy()


LAYERS: list[Callable[[], nn.Module]] = [
    lambda: KeyedDropout(0.3),
    lambda: KeyedDropout(0.3, "channel"),
    lambda: KeyedDropPath(0.5),
    noise,
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("shape", [(24, 5), (24, 5, 7), (24, 5, 3, 3)])
def test_a_draw_depends_on_the_sample_not_on_its_chunk(layer: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    whole = drawn(layer(), x)
    assert not torch.equal(whole, x) and whole.shape == x.shape
    for chunks in (2, 3, 12):
        parts = [drawn(layer(), part, keys) for part, keys in zip(x.chunk(chunks), KEYS.chunk(chunks), strict=True)]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("layer", LAYERS)
def test_rows_calls_layers_and_steps_draw_differently(layer: Callable[[], nn.Module]) -> None:
    x = torch.ones(24, 64, 2)
    whole = drawn(layer(), x)
    others = {
        "call": drawn(layer(), x, calls=2),
        "step": drawn(layer(), x, sample_keys(3, 8, torch.arange(12))),
        "seed": drawn(layer(), x, sample_keys(4, 7, torch.arange(12))),
    }
    two = nn.Sequential(layer(), layer())
    with keyed_layers.drawing(two, KEYS):
        first, second = two[0](x), two[1](x)
    assert torch.equal(first, whole)
    others["layer"] = second
    others["row of a sample"] = whole.unflatten(0, (12, 2)).flip(1).flatten(0, 1)
    others["sample"] = whole.unflatten(0, (12, 2)).flip(0).flatten(0, 1)
    for name, other in others.items():
        assert not torch.equal(other, whole), name
    assert torch.equal(drawn(layer(), x), whole)  # and again alike: calls are counted from 0


def test_an_order_of_layers_by_name_decides_their_numbers() -> None:
    network = nn.Sequential()
    network.add_module("b", KeyedDropout())
    network.add_module("a", KeyedDropout())
    assert keyed_layers.find(network) == [network.get_submodule("a"), network.get_submodule("b")]


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.5, 0.9])
def test_the_share_that_is_dropped(rate: float) -> None:
    keys, x = sample_keys(0, 0, torch.arange(100)), torch.ones(200, 999)
    y = drawn(KeyedDropout(rate), x, keys)
    share = (y == 0).double().mean().item()
    assert abs(share - rate) < 4 * (rate * (1 - rate) / x.numel()) ** 0.5 + 2**-16
    assert_close(y.max().item(), 1 / (1 - rate), rtol=1e-4, atol=0)
    # Independent of neighbours: elements of one word, of a row, and of the two rows of a sample.
    dropped = (y == 0).double() - rate
    bound = 5 * rate * (1 - rate) / x.numel() ** 0.5
    for a, b in ((dropped[:, 1:], dropped[:, :-1]), (dropped[:, 4:], dropped[:, :-4]), (dropped[::2], dropped[1::2])):
        assert abs((a * b).mean().item()) < bound * 2**0.5
    assert drawn(KeyedDropout(rate, "channel"), torch.ones(24, 50, 4, 4)).flatten(2).var(2).max() == 0
    assert drawn(KeyedDropPath(rate), torch.ones(24, 50, 4)).flatten(1).var(1).max() == 0


def test_gradients_pass_where_nothing_was_dropped() -> None:
    x = torch.randn(24, 9, dtype=torch.float64, requires_grad=True)
    y = drawn(KeyedDropout(0.25), x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert_close(grad, torch.where(y == 0, 0.0, 1 / 0.75).double())


def test_noise_is_normal() -> None:
    keys = sample_keys(0, 0, torch.arange(100))
    with keyed_layers.drawing(layer := nn.Sequential(KeyedNoise()), keys):
        e = layer[0](torch.zeros(200, 501, dtype=torch.float64), 1.0)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        assert abs((e**power).mean().item() - moment) < 0.05
    assert abs((e[:, 1:] * e[:, :-1]).mean().item()) < 0.02 and abs((e[:, :250] * e[:, 251:]).mean().item()) < 0.02
    std = torch.full((24, 5), 0.5, requires_grad=True)
    with keyed_layers.drawing(layer, KEYS):
        layer[0](torch.zeros(24, 5), std).sum().backward()
    assert std.grad is not None and std.grad.abs().min() > 0


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_is_drawn_in_eval_mode_in_targets_and_in_momentum_encoders(layer: Callable[[], nn.Module]) -> None:
    network, x = nn.Sequential(layer()), torch.randn(24, 6)
    with keyed_layers.off(network):
        assert network(x) is x
    momentum = MomentumEncoder(network)
    assert torch.equal(momentum(x), x) and momentum.training
    with keyed_layers.drawing(nn.ModuleList([network, momentum]), KEYS):
        assert torch.equal(momentum(x), x)
        assert torch.equal(network(x), drawn(layer(), x))  # the momentum encoder's layers change no number
    assert network.eval()(x) is x


def test_a_rate_of_0_changes_no_bit_and_1_drops_all() -> None:
    x = torch.randn(24, 6)
    assert drawn(KeyedDropout(0.0), x) is x and not drawn(KeyedDropout(1.0), x).any()


def test_without_keys_or_with_other_rows_it_is_refused() -> None:
    with pytest.raises(RuntimeError, match="given none"):
        KeyedDropout()(torch.ones(24, 2))
    with pytest.raises(RuntimeError, match="25 rows for 12 samples"):
        drawn(KeyedDropout(), torch.ones(25, 2))


class DropPath(nn.Module):
    """As timm's."""

    def __init__(self, drop_prob: float, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep


class StochasticDepth(nn.Module):
    """As torchvision's."""

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode


def test_a_librarys_layers_are_replaced() -> None:
    shared = nn.Dropout(0.2)
    network = nn.Sequential(
        shared,
        nn.Sequential(nn.Dropout2d(0.3), nn.Linear(2, 2)),
        DropPath(0.4, False),
        StochasticDepth(0.1, "row"),
        shared,
        nn.MultiheadAttention(4, 2),
        nn.AlphaDropout(0.0),
    )
    keyed_layers.use_keyed_layers(network)
    found = [(type(m), m.rate, m.unit, m.scaled) for m in keyed_layers.find(network) if isinstance(m, KeyedDropout)]
    assert found == [
        (KeyedDropout, 0.2, "element", True),
        (KeyedDropout, 0.3, "channel", True),
        (KeyedDropPath, 0.4, "row", False),
        (KeyedDropPath, 0.1, "row", True),
    ]
    assert network[4] is network[0]
    with pytest.raises(AttributeError):  # a library that draws by itself at this rate fails, where it would go wrong
        _ = network[0].p


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.RReLU(), "RReLU"),
        (nn.AlphaDropout(0.1), "AlphaDropout"),
        (nn.FeatureAlphaDropout(0.1), "FeatureAlphaDropout"),
        (nn.MultiheadAttention(4, 2, dropout=0.1), "MultiheadAttention"),
        (nn.LSTM(4, 4, 2, dropout=0.1), "LSTM"),
        (StochasticDepth(0.1, "batch"), "StochasticDepth"),
    ],
)
def test_other_random_layers_are_refused_by_name(layer: nn.Module, named: str) -> None:
    with pytest.raises(UserError, match=rf"layer 1\.0 is a {named}"):
        keyed_layers.use_keyed_layers(nn.Sequential(nn.ReLU(), nn.Sequential(layer)))
