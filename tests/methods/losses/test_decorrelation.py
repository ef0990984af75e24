"""Barlow Twins' and VICReg's terms against their formulas by autograd in fp64: on one rank and three, with small
batches, large means and half precision, and what crosses ranks."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.losses.decorrelation import cross_correlation, variance_and_covariance
from tests.helpers.process_groups import run_ranks
from tests.methods.losses.test_nt_xent import Largest

Terms = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
LOSSES: tuple[Terms, ...] = (cross_correlation, variance_and_covariance)
WEIGHTS = 3.0, 0.7  # of the two terms


def off_diagonal(c: Tensor) -> Tensor:
    return c[~torch.eye(len(c), dtype=torch.bool)]


def plain_correlation(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Barlow Twins, eq. 1 and 2, with the epsilon of the authors' norm."""
    x, y = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (x, y))
    c = torch.einsum("bi,bj->ij", x, y) / len(x)
    return (1 - c.diagonal()).square().sum(), off_diagonal(c).square().sum()


def plain_variance(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """VICReg, eq. 1 and 4."""
    v = sum(F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean() for z in (x, y))
    c = sum(off_diagonal(torch.cov(z.T).view(2 * z.shape[1:])).square().sum() / z.shape[1] for z in (x, y))
    return torch.as_tensor(v), torch.as_tensor(c)


PLAIN: dict[Terms, Terms] = {cross_correlation: plain_correlation, variance_and_covariance: plain_variance}


def views(n: int, dim: int, offset: float = 0.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Two views that agree in part, with standard deviations from 0.3 to 3 and means of `offset` of them."""
    generator = torch.Generator().manual_seed(n + dim)
    both = torch.randn(3, n, dim, generator=generator, dtype=torch.float64)
    scale = torch.logspace(-0.5, 0.5, dim, dtype=torch.float64)
    x, y = ((both[0] + both[i]) * scale / 2**0.5 + offset * scale for i in (1, 2))
    return x.to(dtype).requires_grad_(), y.to(dtype).requires_grad_()


def weighted(terms: tuple[Tensor, Tensor]) -> Tensor:
    return WEIGHTS[0] * terms[0] + WEIGHTS[1] * terms[1]


def gradients(terms: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return torch.cat(torch.autograd.grad(weighted(terms), (x, y))).double()


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("ours", LOSSES)
@pytest.mark.parametrize(("n", "dim"), [(2, 3), (7, 1), (30, 8), (9, 40)])
def test_terms_and_gradient_equal_autograd(ours: Terms, n: int, dim: int) -> None:
    """Also fewer samples than dimensions, two samples, and one dimension, which has nothing off the diagonal."""
    x, y = views(n, dim)
    for got, want in zip(ours(x, y), PLAIN[ours](x, y), strict=True):
        assert_close(got, want, rtol=1e-12, atol=1e-13)
    assert error(gradients(ours(x, y), x, y), gradients(PLAIN[ours](x, y), x, y)) <= 1e-12


@pytest.mark.parametrize("ours", LOSSES)
def test_each_term_has_its_own_gradient(ours: Terms) -> None:
    x, y = views(12, 5)
    for k in range(2):
        got, want = (torch.cat(torch.autograd.grad(terms(x, y)[k], (x, y))) for terms in (ours, PLAIN[ours]))
        assert error(got, want) <= 1e-12


@pytest.mark.parametrize("ours", LOSSES)
def test_gradients_by_finite_differences(ours: Terms) -> None:
    assert torch.autograd.gradcheck(lambda x, y: weighted(ours(x, y)), views(6, 4))


@pytest.mark.parametrize("ours", LOSSES)
@pytest.mark.parametrize("offset", [0, 30, 1000])
def test_large_means_cost_fp32_no_digits_but_those_of_the_input(ours: Terms, offset: int) -> None:
    """At a mean of 1000 standard deviations fp32 moments about zero would have no digit of a covariance left."""
    x, y = views(64, 6, offset, torch.float32)
    exact = tuple(z.detach().double().requires_grad_() for z in (x, y))
    want = PLAIN[ours](*exact)
    assert abs(weighted(ours(x, y)).double() / weighted(want) - 1) < 2e-6
    assert error(gradients(ours(x, y), x, y), gradients(want, *exact)) < 2e-6


@pytest.mark.parametrize("ours", LOSSES)
def test_halves_are_computed_in_fp32_within_autocast(ours: Terms) -> None:
    """A product in bf16 has an error of 1e-3."""
    x, y = views(64, 16, dtype=torch.bfloat16)
    exact = tuple(z.detach().double().requires_grad_() for z in (x, y))
    with torch.autocast("cpu", torch.bfloat16):
        terms = ours(x, y)
        full = ours(x.float(), y.float())
        assert [term.dtype for term in terms] == [torch.float32] * 2
        gradient = gradients(ours(*(both := [z.detach().float().requires_grad_() for z in (x, y)])), *both)
    for got, same, want in zip(terms, full, PLAIN[ours](*exact), strict=True):
        assert torch.equal(got, same) and abs(got.double() / want - 1) < 1e-5
    assert error(gradient, gradients(PLAIN[ours](*exact), *exact)) < 1e-5


def test_a_constant_dimension_has_finite_terms_and_gradients() -> None:
    for ours in LOSSES:
        x, y = (z.detach().float() for z in views(8, 4))
        x[:, 1], y[:, 2] = 3.0, 0.0
        x, y = x.requires_grad_(), y.requires_grad_()
        assert gradients(ours(x, y), x, y).isfinite().all()


@pytest.mark.parametrize("ours", LOSSES)
def test_memory_is_that_of_the_rows_and_of_two_matrices(ours: Terms) -> None:
    """No matrix of samples by samples, even where there are many more of them than dimensions."""
    n, dim = 512, 16
    x, y = views(n, dim, dtype=torch.float32)
    with Largest() as seen:
        weighted(ours(x, y)).backward()
    assert seen.elements <= max(2 * n * dim, 2 * dim * dim)


class _Sent(TorchDispatchMode):
    """The elements of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN202
        if func.namespace == "c10d":
            tensors = args[1] if "allgather" in func.__name__ else args[0]
            self.elements.append(sum(t.numel() for t in (tensors if isinstance(tensors, list) else [tensors])))
        return func(*args, **(kwargs or {}))


Outcome = tuple[list[float], list[list[int]], str]


def _on_ranks(n: int, dim: int) -> Outcome:
    """The errors of terms and gradients, what forward and backward send, and the refusal of unequal batches."""
    errors: list[float] = []
    sent: list[list[int]] = []
    rank, world = collectives.rank(), collectives.world_size()
    for ours in LOSSES:
        whole = views(n * world, dim)
        want = gradients(PLAIN[ours](*whole), *whole)
        x, y = (z.detach().chunk(world)[rank].requires_grad_() for z in whole)
        with _Sent() as forward:
            terms = ours(x, y)
        with _Sent() as backward:
            got = torch.stack(torch.autograd.grad(weighted(terms), (x, y)))
        sent += [forward.elements, backward.elements]
        gathered = collectives.gather(got.transpose(0, 1).contiguous()).transpose(0, 1).flatten(0, 1) / world
        errors.append(error(gathered, want))
        errors += [error(a, b) for a, b in zip(terms, PLAIN[ours](*whole), strict=True)]
    try:
        uneven = torch.randn(3 + rank, dim)
        cross_correlation(uneven, uneven)
    except UserError as refused:
        return errors, sent, str(refused)
    return errors, sent, "no refusal"


@pytest.mark.parametrize("n", [1, 5])
def test_ranks_have_the_formulas_terms_and_gradients_and_send_nothing_in_the_backward(n: int) -> None:
    """Also with one sample on each rank, whose own variance does not exist."""
    dim = 7
    for errors, sent, refusal in run_ranks(3, _on_ranks, n, dim, timeout=300):
        assert max(errors) <= 1e-12, errors
        forward, backward = sent[0::2], sent[1::2]
        assert backward == [[], []]
        # The comparison of batch sizes, the moments and the matrix.
        assert forward == [[1, 4 * dim, dim * dim], [1, 2 * dim, 2 * dim * dim]], forward
        assert "pairs of views differ over ranks: [3, 4, 5]" in refusal


def test_wrong_arguments_are_refused() -> None:
    x, y = views(4, 8)
    for name, ours in zip(("cross_correlation", "variance_and_covariance"), LOSSES, strict=True):
        with pytest.raises(UserError, match=rf"{name} takes .* \(4, 8\) and \(3, 8\)"):
            ours(x, y[:3])
        with pytest.raises(UserError, match=rf"{name} needs two images"):
            ours(x[:1], y[:1])
    assert not dist.is_initialized()
