"""CLIP's loss against figure 3 of its paper in fp64: on one rank and several, in tiles and in Triton's interpreter."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.losses.contrastive import clip_loss
from kilobatch.methods.losses.nt_xent import CPU_TILE
from kilobatch.methods.options import Operands
from tests.helpers.process_groups import run_ranks
from tests.methods.losses.test_nt_xent import ROUNDING, Largest, gradients, views

ALL: tuple[Operands, ...] = ("fp32", "tf32", "bf16", "fp16")
BOUNDED, CAREFUL = 0.1, 0.02  # temperatures: plain exponentials, and with a maximum taken out
LEARNT = 0.07
# Largest relative errors of kernels at temperature 0.1, the same as in tests/methods/losses/test_loss_kernels.py. With
# fewer than five pairs the temperature's gradient is a small difference of large numbers.
LIMITS = {"fp32": 1e-6, "tf32": 1e-6, "bf16": 8e-3, "fp16": 6e-4}

Case = tuple[Operands | str, float, int, int]  # operands or the type, temperature, pairs, dimensions
Errors = dict[Case, tuple[float, float]]  # of the loss, and of the gradients including the temperature's


def plain(z1: Tensor, z2: Tensor, temperature: float | Tensor) -> Tensor:
    """Figure 3."""
    s = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    labels = torch.arange(len(s))
    return (F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels)) / 2


def learnt(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("n", [2, 3, CPU_TILE[1] + 1, CPU_TILE[0] + 77])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_loss_and_gradient_equal_autograd(n: int, temperature: float) -> None:
    z1, z2 = views(n, 16)
    ours, theirs = clip_loss(z1, z2, temperature), plain(z1, z2, temperature)
    assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    want = gradients(3 * theirs, z1, z2)
    assert (gradients(3 * ours, z1, z2) - want).norm() <= 1e-11 * want.norm()


@pytest.mark.parametrize("value", [0.01, 0.07, 0.5])
def test_learnable_temperature(value: float) -> None:
    (z1, z2), temperature = views(CPU_TILE[0] + 9, 8), learnt(value)
    want = torch.autograd.grad(plain(z1, z2, temperature), (z1, z2, temperature))
    got = torch.autograd.grad(clip_loss(z1, z2, temperature), (z1, z2, temperature))
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 1e-11 * w.norm()


def test_tiny_loss_keeps_its_digits_in_fp32() -> None:
    z1, z2 = views(512, 128, torch.float32, alike=0.6)
    exact = plain(z1.double(), z2.double(), 0.02)
    assert 1e-12 < exact < 1e-9
    ours, want = clip_loss(z1, z2, 0.02), gradients(exact, z1, z2)
    assert abs(ours.double() / exact - 1) < ROUNDING
    assert (gradients(ours, z1, z2) - want).norm() < ROUNDING * want.norm()


def test_the_smallest_temperature_is_finite_in_fp32() -> None:
    """Similarities are +-1e4, whose exponentials overflow in fp32."""
    z1, z2 = views(100, 16, torch.float32)
    with torch.no_grad():
        z2[:50] *= -1
    exact = plain(z1.double(), z2.double(), 1e-4)
    loss = clip_loss(z1, z2, torch.tensor(1e-4))
    assert loss.isfinite() and abs(loss.double() / exact - 1) < 1e-5
    want = gradients(exact, z1, z2)
    assert (gradients(loss, z1, z2) - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("temperature", [BOUNDED, CAREFUL])
def test_no_matrix_of_all_similarities(temperature: float) -> None:
    n, dim = 1024, 16
    z1, z2 = views(n, dim, torch.float32)
    with Largest() as seen:
        clip_loss(z1, z2, temperature).backward()
    assert seen.elements <= max(2 * n * dim, CPU_TILE[0] * CPU_TILE[1])


def test_wrong_arguments_are_refused() -> None:
    z1, z2 = views(4, 8)
    for temperature in (0.0, float("nan")):
        with pytest.raises(UserError, match="temperature"):
            clip_loss(z1, z2, temperature)
    with pytest.raises(UserError, match=r"clip_loss takes .* \(4, 8\) and \(3, 8\)"):
        clip_loss(z1, z2[:3], 0.1)
    with pytest.raises(UserError, match="clip_loss needs two images"):
        clip_loss(z1[:1], z2[:1], 0.1)


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def errors_of(n: int, dim: int, operands: Operands, value: float, dtype: torch.dtype) -> tuple[float, float]:
    """The errors of the loss, and the largest of the gradients, for n pairs over all ranks."""
    z, temperature, learn = views(n, dim), learnt(value), value == LEARNT
    want_loss = plain(*z, temperature)
    want = torch.autograd.grad(want_loss, (*z, temperature))
    z1, z2 = (x.detach().chunk(collectives.world_size())[collectives.rank()].to(dtype).requires_grad_() for x in z)
    loss = clip_loss(z1, z2, temperature if learn else value, operands)
    inputs = (z1, z2, temperature) if learn else (z1, z2)
    got = torch.autograd.grad(5 * loss, inputs)
    errors = [
        error(collectives.gather(g) / collectives.world_size(), 5 * w) for g, w in zip(got[:2], want[:2], strict=True)
    ]
    errors += [error(collectives.mean(g), 5 * w) for g, w in zip(got[2:], want[2:], strict=False)]
    return error(collectives.mean(loss), want_loss), max(errors)


def tiled_errors() -> Errors:
    """Errors for n of 1 on each rank, and for more than a tile has columns."""
    sizes = collectives.world_size(), collectives.world_size() * 261
    errors: Errors = {}
    for n, t, dtype in itertools.product(sizes, (BOUNDED, CAREFUL, LEARNT), (torch.float64, torch.float32)):
        errors[str(dtype), t, n, 8] = errors_of(n, 8, "fp32", t, dtype)
    errors["bf16", BOUNDED, 120, 64] = errors_of(120, 64, "bf16", BOUNDED, torch.float32)
    return errors


def refusal_of_unequal() -> str:
    z = torch.randn(3 + collectives.rank(), 8)
    try:
        clip_loss(z, z, 0.1)
    except UserError as error:
        return str(error)
    return "no refusal"


def errors_and_refusal() -> tuple[Errors, str]:
    return tiled_errors(), refusal_of_unequal()


def test_ranks_have_the_formulas_gradients() -> None:
    """Also of the temperature, and with a single pair on each rank."""
    limits = {"torch.float64": 1e-12, "torch.float32": 5e-6, "bf16": LIMITS["bf16"]}
    for errors, refusal in run_ranks(3, errors_and_refusal, timeout=300):
        for case, (loss, gradient) in errors.items():
            assert loss <= limits[case[0]] and gradient <= limits[case[0]], (case, loss, gradient)
        assert errors["bf16", BOUNDED, 120, 64][1] > 1e-4  # computed in bf16, not in fp32
        assert "pairs of views differ over ranks" in refusal


def kernel_errors(sizes: tuple[tuple[int, int], ...], blocks: int) -> Errors:
    import logging

    from kilobatch.methods.losses.kernels import clip as kernels

    messages: list[str] = []
    log = logging.getLogger("kilobatch")
    log.setLevel(logging.INFO)
    log.addFilter(lambda record: messages.append(record.getMessage()) or True)
    kernels.ROW_BLOCKS = blocks
    errors: Errors = {}
    for (n, dim), operands, t in itertools.product(sizes, ALL, (BOUNDED, CAREFUL, LEARNT)):
        errors[operands, t, n, dim] = errors_of(n, dim, operands, t, torch.float32)
    fused_messages = [m for m in messages if "CLIP's loss" in m]
    assert len(fused_messages) == len(ALL) and all(
        m.endswith("Triton's kernels, interpreted") for m in fused_messages
    ), messages
    return errors


def test_kernels_give_loss_and_gradients_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter: several blocks of rows, one in a launch (131 pairs); one block with split columns (5
    pairs); and 3 ranks with 11 pairs each, whose positives are in any tile."""
    pytest.importorskip("triton", reason="no triton for this system", exc_type=ImportError)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    alone = run_ranks(1, kernel_errors, ((5, 16), (131, 24)), 1, timeout=300)[0]
    of_three = run_ranks(3, kernel_errors, ((33, 24),), 32, timeout=300)[0]
    for case, (loss, gradient) in [*alone.items(), *of_three.items()]:
        operands, temperature, *_ = case
        limit = LIMITS[operands] * BOUNDED / temperature
        assert loss <= limit and gradient <= limit, (case, loss, gradient)
        assert (gradient > 2e-5) == (operands in ("bf16", "fp16")), (case, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("operands", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("dim", [128, 256])
def test_kernels_compile_for_gpus_and_fit_them(dim: int, operands: Operands, capability: int) -> None:
    pytest.importorskip("triton", reason="no triton for this system", exc_type=ImportError)
    from kilobatch.methods.losses.kernels import clip
    from kilobatch.methods.losses.kernels.blocks import kernel_options
    from tests.helpers.ptxas import SHARED_MEMORY, assert_fits, build

    types: dict[str, str] = dict.fromkeys(("own", "all_rows"), "*bf16" if operands == "bf16" else "*fp32")
    types |= dict.fromkeys(("row_sums", "column_sums", "weights", "all_weights", "du"), "*fp32")
    for kernel, online_max in itertools.product((clip._sums, clip._gradient), (False, True)):
        arguments: Any = kernel
        values = kernel_options(dim, operands, SHARED_MEMORY[capability]) | {"ONLINE_MAX": online_max}
        values = {name: x for name, x in values.items() if name in arguments.arg_names or name.islower()}
        built = build(kernel, types, values, capability)
        assert_fits(built, operands, capability, (kernel, online_max))
