"""The momentum encoder: parameters, buffers and statistics."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.methods.memories.momentum_encoder import MomentumEncoder, rising
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.batch_norm import BatchNorm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm(4, "local"), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def images(seed: int) -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def test_starts_as_a_copy_without_gradient() -> None:
    online = network()
    momentum = MomentumEncoder(online)
    assert_close(momentum.network.state_dict(), online.state_dict(), rtol=0, atol=0)
    assert not any(p.requires_grad for p in momentum.parameters())
    assert all(p.requires_grad for p in online.parameters())
    y = momentum(images(0).requires_grad_())
    assert not y.requires_grad
    with torch.no_grad():
        next(online.parameters()).add_(1)
    assert not torch.equal(next(online.parameters()), next(momentum.parameters()))


def test_follows_the_parameters_and_takes_the_buffers() -> None:
    online, momentum = network(), MomentumEncoder(network())
    before = copied(momentum.network)
    with torch.no_grad():
        for p in online.parameters():
            p += torch.randn_like(p)
    online(images(0))
    batch_norm.commit(online)
    momentum.follow(online, 0.9)
    for name, p in online.named_parameters():
        assert_close(momentum.network.get_parameter(name), 0.9 * before[name] + 0.1 * p)
    for name, buffer in online.named_buffers():
        assert torch.equal(momentum.network.get_buffer(name), buffer)
    assert not torch.equal(online.get_buffer("1.running_mean"), before["1.running_mean"])
    momentum.follow(online, 1.0)
    momentum.follow(online, 0.0)
    assert_close(momentum.network.state_dict(), online.state_dict(), rtol=0, atol=0)


def test_its_norms_use_their_own_batch_and_do_not_record_it() -> None:
    """In a method that holds it with the online network and commits once a step; also in a chunk's second pass."""
    method = nn.ModuleDict({"online": network()})
    method["momentum"] = momentum = MomentumEncoder(method["online"])
    before = copied(momentum)
    keys = momentum(images(0))
    assert_close(keys, network()(images(0)))  # of this batch's statistics, not of the running ones
    assert not torch.allclose(keys, network().eval()(images(0)), atol=0.01)
    with batch_norm.frozen(method):
        momentum(images(1))
    momentum(images(1))
    method["online"](images(2))
    batch_norm.commit(method)
    assert_close(copied(momentum), before, rtol=0, atol=0)
    alone = network()
    alone(images(2))
    batch_norm.commit(alone)
    assert_close(method["online"].state_dict(), alone.state_dict(), rtol=0, atol=0)


def test_own_statistics_are_counted_once_a_step() -> None:
    """By the average over chunks; they do not follow the online network's."""
    method = nn.ModuleDict({"online": network()})
    method["momentum"] = momentum = MomentumEncoder(method["online"], own_statistics=True)
    for step in range(3):
        for chunk in (0, 1):
            momentum(images(10 * step + chunk))
            method["online"](images(100 + 10 * step + chunk))
            with batch_norm.frozen(method):
                method["online"](images(100 + 10 * step + chunk))
        batch_norm.commit(method)
        momentum.follow(method["online"], 1.0)  # the parameters stay
    alone = network()
    for step in range(3):
        for chunk in (0, 1):
            alone(images(10 * step + chunk))
        batch_norm.commit(alone)
    assert_close(momentum.network.state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert momentum.network.get_buffer("1.num_batches_tracked") == 3
    assert not torch.equal(momentum.network.get_buffer("1.running_mean"), method["online"].get_buffer("1.running_mean"))


def test_with_own_statistics_it_takes_other_buffers() -> None:
    online = nn.Sequential(BatchNorm(2, "local"))
    online.register_buffer("scale", torch.ones(1))
    momentum = MomentumEncoder(online, own_statistics=True)
    for name in ("scale", "0.running_mean"):
        online.get_buffer(name).fill_(3)
    momentum.follow(online, 0.9)
    assert momentum.network.get_buffer("scale") == 3 and not momentum.network.get_buffer("0.running_mean").any()


def test_chunks_are_batches_of_their_own() -> None:
    momentum = MomentumEncoder(network())
    parts = torch.cat([momentum(images(seed)) for seed in range(3)])
    assert_close(parts, torch.cat([network()(images(seed)) for seed in range(3)]))


@pytest.mark.parametrize("momentum", [0.0, 0.99, 0.996])
def test_rising_is_half_a_cosine(momentum: float) -> None:
    assert rising(momentum, 0.0) == pytest.approx(momentum, abs=1e-15) and rising(momentum, 1.0) == 1.0
    assert rising(momentum, 0.5) == pytest.approx((1 + momentum) / 2)
    # moco-v3, adjust_moco_momentum: 1. - 0.5 * (1. + math.cos(math.pi * epoch / args.epochs)) * (1. - args.moco_m)
    assert rising(momentum, 0.3) == pytest.approx(1.0 - 0.5 * (1.0 + math.cos(math.pi * 30 / 100)) * (1.0 - momentum))
