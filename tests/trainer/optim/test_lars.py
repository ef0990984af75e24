"""LARS against plain transcriptions of the four authors' code, one tensor at a time."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from kilobatch.data.errors import UserError
from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.optim.norms import squares

LR, MOMENTUM, DECAY, TRUST = 0.7, 0.9, 1e-2, 0.02
STEPS = 20


def google(w: Tensor, g: Tensor, v: Tensor, lr: float, adapt: bool, nesterov: bool) -> tuple[Tensor, Tensor]:
    """google-research/simclr, lars_optimizer.py, apply_gradients with classic_momentum."""
    ratio = 1.0
    if adapt:
        g = g + DECAY * w
        w_norm, g_norm = w.norm().item(), g.norm().item()
        ratio = (TRUST * w_norm / g_norm if g_norm > 0 else 1.0) if w_norm > 0 else 1.0
    scaled_lr = lr * ratio
    v = MOMENTUM * v + scaled_lr * g
    update = MOMENTUM * v + scaled_lr * g if nesterov else v
    return w - update, v


def bolts(w: Tensor, g: Tensor, v: Tensor, lr: float, adapt: bool, nesterov: bool) -> tuple[Tensor, Tensor]:
    """Lightning Bolts, optimizers/lars.py, step; its weight_decay != 0 stands for adapt."""
    p_norm, g_norm = w.norm().item(), g.norm().item()
    if adapt and p_norm != 0 and g_norm != 0:
        lars_lr = TRUST * p_norm / (g_norm + p_norm * DECAY + 1e-8)
        g = (g + DECAY * w) * lars_lr
    v = MOMENTUM * v + g
    return w - lr * (g + MOMENTUM * v if nesterov else v), v


def larc(w: Tensor, g: Tensor, v: Tensor, lr: float, adapt: bool, nesterov: bool) -> tuple[Tensor, Tensor]:
    """NVIDIA/apex, parallel/LARC.py with clip, around torch's SGD."""
    param_norm, grad_norm = w.norm().item(), g.norm().item()
    if adapt and param_norm != 0 and grad_norm != 0:
        adaptive_lr = TRUST * param_norm / (grad_norm + param_norm * DECAY + 1e-8)
        adaptive_lr = min(adaptive_lr / lr, 1)
        g = (g + DECAY * w) * adaptive_lr
    v = MOMENTUM * v + g
    return w - lr * (g + MOMENTUM * v if nesterov else v), v


def byol(w: Tensor, g: Tensor, v: Tensor, lr: float, adapt: bool, nesterov: bool) -> tuple[Tensor, Tensor]:
    """DeepMind's BYOL, utils/optimizers.py, and MoCo v3's moco/optimizer.py; they have no nesterov."""
    if adapt:
        g = g + DECAY * w
        w_norm, g_norm = w.norm().item(), g.norm().item()
        if w_norm > 0 and g_norm > 0:
            g = g * (TRUST * w_norm / g_norm)
    v = MOMENTUM * v + g
    return w - lr * (g + MOMENTUM * v if nesterov else v), v


AUTHORS = {"google": google, "bolts": bolts, "larc": larc, "byol": byol}
SHAPES = [(16, 3, 3, 3), (16,), (10, 16), (10,), (), (4, 4)]


def start() -> list[Tensor]:
    torch.manual_seed(0)
    tensors = [torch.randn(shape) for shape in SHAPES]
    tensors[-1].zero_()
    return tensors


def gradient(step: int, i: int, shape: tuple[int, ...]) -> Tensor:
    """Gradients of very different sizes, some so small that larc clips, and some zero."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(100 * step + i)) * 10.0 ** ((step + i) % 5 - 3)
    return torch.zeros(shape) if (step + i) % 7 == 3 else g


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dialect", [*AUTHORS])
def test_equals_the_authors(dialect: str, nesterov: bool) -> None:
    ours = [nn.Parameter(w) for w in start()]
    options = {"momentum": MOMENTUM, "weight_decay": DECAY, "trust_coefficient": TRUST}
    optimizer = LARS(ours, LR, nesterov=nesterov, dialect=dialect, **options)  # pyright: ignore[reportArgumentType]
    theirs = [w.double() for w in start()]
    momenta = [torch.zeros_like(w) for w in theirs]
    for step in range(STEPS):
        lr = LR * (1 + step) / STEPS
        for group in optimizer.param_groups:
            group["lr"] = lr
        for i, w in enumerate(ours):
            w.grad = gradient(step, i, SHAPES[i])
        optimizer.step()
        for i, (w, v) in enumerate(zip(theirs, momenta, strict=True)):
            g = gradient(step, i, SHAPES[i]).double()
            theirs[i], momenta[i] = AUTHORS[dialect](w, g, v, lr, len(SHAPES[i]) > 1, nesterov)
    for mine, reference, initial in zip(ours, theirs, start(), strict=True):
        moved = (reference - initial).norm()
        assert moved > 0
        assert (mine - reference).norm() <= 1e-6 * reference.norm()


def test_dialects_differ() -> None:
    ends = []
    for dialect in AUTHORS:
        w = nn.Parameter(torch.ones(3, 3))
        optimizer = LARS([w], 0.1, weight_decay=0.5, dialect=dialect)  # pyright: ignore[reportArgumentType]
        for lr in (0.1, 0.5):
            optimizer.param_groups[0]["lr"] = lr
            w.grad = torch.linspace(-1, 1, 9).view(3, 3)
            optimizer.step()
        ends.append(w[0, 0].item())
    assert len({round(end, 8) for end in ends}) == 4, ends


@pytest.mark.parametrize("dialect", [*AUTHORS])
def test_zeros_are_defined(dialect: str) -> None:
    """Zero weights or gradients have ratio 1; without decay a tensor at rest stays at rest."""
    zero, still, both = (nn.Parameter(x) for x in (torch.zeros(2, 2), torch.ones(2, 2), torch.zeros(2, 2)))
    optimizer = LARS([zero, still, both], 0.1, weight_decay=0.0, dialect=dialect)  # pyright: ignore[reportArgumentType]
    zero.grad, still.grad, both.grad = torch.ones(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert torch.equal(torch.stack(list(optimizer.trust_ratios().values())), torch.ones(3))
    torch.testing.assert_close(zero, torch.full((2, 2), -0.1))  # a plain step of lr * g
    assert torch.equal(still, torch.ones(2, 2))
    assert torch.equal(both, torch.zeros(2, 2))


@pytest.mark.parametrize("dialect", [*AUTHORS])
def test_adapts_without_decay(dialect: str) -> None:
    """The step's length does not depend on the gradient's."""
    lengths = []
    for size in (1.0, 1000.0):
        w = nn.Parameter(torch.ones(2, 2))
        optimizer = LARS([w], 1.0, weight_decay=0.0, dialect=dialect)  # pyright: ignore[reportArgumentType]
        w.grad = torch.full((2, 2), size)
        optimizer.step()
        lengths.append((w - 1).norm().item())
    assert lengths == pytest.approx([0.002, 0.002], rel=1e-4)  # 0.001 * |w|, |w| = 2


def test_excluded_tensors_are_plain_momentum_sgd() -> None:
    bias, reference = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    ours, theirs = LARS([bias], 0.1, weight_decay=0.5), torch.optim.SGD([reference], 0.1, momentum=0.9)
    for step in range(5):
        bias.grad = reference.grad = torch.full((5,), float(step))
        ours.step()
        theirs.step()
    torch.testing.assert_close(bias, reference)
    assert ours.trust_ratios() == {}


def test_a_group_may_say_that_it_adapts() -> None:
    """As the flat partitions of ZeRO must: they have one dimension."""
    flat = nn.Parameter(torch.ones(4))
    optimizer = LARS([{"params": [flat], "adapt": True, "names": ["w"]}], 1.0, weight_decay=0.0)
    flat.grad = torch.full((4,), 8.0)
    optimizer.step()
    assert optimizer.trust_ratios()["w"].item() == pytest.approx(0.001 * 2 / 16)


def test_names_follow_the_tensors_that_have_gradients() -> None:
    a, b = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([{"params": [a, b], "adapt": True, "names": ["a", "b"]}], 1.0)
    b.grad = torch.ones(2, 2)
    optimizer.step()
    assert list(optimizer.trust_ratios()) == ["b"]
    assert torch.equal(a, torch.ones(2, 2))


def test_norms_of_large_tensors_are_exact() -> None:
    for size in (1, 1023, 1024, 1025, 3_000_000):
        x = torch.randn(size, generator=torch.Generator().manual_seed(size))
        assert squares([x]).sqrt().item() == pytest.approx(x.double().norm().item(), rel=1e-7)


def test_a_state_dict_goes_on_bit_for_bit() -> None:
    def train(w: nn.Parameter, optimizer: LARS, steps: range) -> None:
        for step in steps:
            w.grad = gradient(step, 0, (16, 3, 3, 3))
            optimizer.step()

    whole = nn.Parameter(start()[0])
    optimizer = LARS([whole], 0.3)
    train(whole, optimizer, range(3))
    other = nn.Parameter(whole.detach().clone())
    resumed = LARS([other], 99.0)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    train(whole, optimizer, range(3, 6))
    train(other, resumed, range(3, 6))
    assert torch.equal(whole, other)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"dialect": "gogle"}, "did you mean 'google'"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"momentum": float("nan")}, "momentum is nan"),
    ],
)
def test_refuses(wrong: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        LARS([nn.Parameter(torch.ones(2, 2))], **{"lr": 0.1, **wrong})
