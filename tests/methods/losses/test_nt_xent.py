from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kilobatch.data.errors import UserError
from kilobatch.methods.losses.contrastive import nt_xent
from kilobatch.methods.losses.nt_xent import CPU_TILE

# Of exponentials of similarities near 50 in fp32, each a sum of 128 products: 2e-5 on processors with AVX2, 5e-6 with
# AVX-512.
ROUNDING = 4e-5


def plain(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> Tensor:
    n = len(z1)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    s = (z @ z.T / temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    return F.cross_entropy(s, torch.arange(2 * n).roll(n))


def views(n: int, dim: int, dtype: torch.dtype = torch.float64, alike: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    z1 = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    z2 = alike * z1 + (1 - alike) * torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return z1.to(dtype).requires_grad_(), z2.to(dtype).requires_grad_()


def gradients(loss: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(loss, (z1, z2)))


@pytest.mark.parametrize("n", [2, 3, 100, CPU_TILE[0], CPU_TILE[0] + 1, 2 * CPU_TILE[1] + 77])
@pytest.mark.parametrize("temperature", [0.02, 0.1, 1.0])
def test_loss_and_gradient_equal_autograd(n: int, temperature: float) -> None:
    """For plain exponentials and for an online maximum, with one tile and with many, full and partial."""
    z1, z2 = views(n, 16)
    ours, theirs = nt_xent(z1, z2, temperature), plain(z1, z2, temperature)
    assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    want = gradients(3 * theirs, z1, z2)
    assert (gradients(3 * ours, z1, z2) - want).norm() <= 1e-11 * want.norm()


@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_kept_tiles_change_no_bit_and_are_no_more_than_allowed(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no tiles kept, some (the next one too large) and all; a second backward finds them unchanged."""
    z1, z2 = views(CPU_TILE[0] + 9, 16, torch.float32)
    found = []
    for allowed in (0, 3 * CPU_TILE[0] * CPU_TILE[1], 2**30):
        monkeypatch.setattr("kilobatch.methods.losses.nt_xent.KEPT_BYTES", allowed)
        loss = nt_xent(z1, z2, temperature)
        saved = loss.grad_fn.saved_tensors[5:]  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
        assert sum(4 * kept.numel() for kept in saved) <= allowed and (saved or not allowed)
        first = torch.cat(torch.autograd.grad(loss, (z1, z2), retain_graph=True))
        assert torch.equal(first, gradients(loss, z1, z2))
        found.append((loss, first))
    for loss, gradient in found[1:]:
        assert loss == found[0][0] and torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("n", [5, CPU_TILE[0] + 9])
@pytest.mark.parametrize("value", [0.03, 0.5])
def test_learnable_temperature(n: int, value: float) -> None:
    z1, z2 = views(n, 8)
    temperature = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(plain(z1, z2, temperature), (z1, z2, temperature))
    got = torch.autograd.grad(nt_xent(z1, z2, temperature), (z1, z2, temperature))
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 1e-11 * w.norm()


def test_tiny_loss_keeps_its_digits_in_fp32() -> None:
    """At a loss for which the usual cross-entropy has no correct digit."""
    z1, z2 = views(512, 128, torch.float32, alike=0.6)
    exact = plain(z1.double(), z2.double(), 0.02)
    assert 1e-12 < exact < 1e-9
    assert abs(plain(z1, z2, 0.02).double() / exact - 1) > 0.5
    ours = nt_xent(z1, z2, 0.02)
    assert abs(ours.double() / exact - 1) < ROUNDING
    want = gradients(exact, z1, z2)
    assert (gradients(ours, z1, z2) - want).norm() < ROUNDING * want.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_fp32_whatever_the_autocast(dtype: torch.dtype) -> None:
    z1, z2 = views(64, 32, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nt_xent(z1, z2, 0.1)
        each = torch.autograd.grad(loss, (z1, z2))
    got = torch.cat(each)
    assert loss.dtype == torch.float32 and got.dtype == dtype
    exact = plain(z1.double(), z2.double(), 0.1)
    assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    want = gradients(exact, z1, z2)
    assert (got.double() - want.double()).norm() < torch.finfo(dtype).eps * want.double().norm()


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for x in flatten(out):
            self.elements = max(self.elements, x.numel())
        return out


def flatten(out: object) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, tuple | list):
        for x in out:
            yield from flatten(x)


@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_no_matrix_of_all_similarities(temperature: float) -> None:
    n, dim = 1024, 16
    z1, z2 = views(n, dim, torch.float32)
    with Largest() as seen:
        nt_xent(z1, z2, temperature).backward()
    assert seen.elements <= max(2 * n * dim, CPU_TILE[0] * CPU_TILE[1])
    with Largest() as seen:
        plain(z1, z2, temperature).backward()
    assert seen.elements == (2 * n) ** 2


def test_wrong_temperatures_and_shapes_are_refused() -> None:
    z1, z2 = views(4, 8)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="temperature"):
            nt_xent(z1, z2, temperature)
    with pytest.raises(UserError, match=r"\(4, 8\) and \(3, 8\)"):
        nt_xent(z1, z2[:3], 0.1)
    with pytest.raises(UserError, match="two images"):
        nt_xent(z1[:1], z2[:1], 0.1)


def test_nan_stays_nan() -> None:
    z1, z2 = views(4, 8)
    with torch.no_grad():
        z1[0, 0] = torch.nan
    for temperature in (0.02, 0.1):
        assert nt_xent(z1, z2, temperature).isnan()
