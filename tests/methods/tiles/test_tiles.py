"""The passes over a tile, compiled for fp32 on a CPU, against fp64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from kilobatch.methods.options import LARGEST_EXPONENT
from kilobatch.methods.tiles.torch_ops import exp_and_sum_, exp_and_weigh_

SHAPES = [(1, 1), (3, 7), (64, 16), (37, 259)]  # also sides that no vector's width divides


def similarities(rows: int, columns: int) -> Tensor:
    """(R, C) fp32, over the whole range that may occur."""
    generator = torch.Generator().manual_seed(rows)
    return (2 * torch.rand(rows, columns, generator=generator) - 1) * LARGEST_EXPONENT


def exponentials(values: Tensor) -> Tensor:
    out = values.clone()[None]
    exp_and_sum_(out, torch.zeros(1))
    return out[0]


def test_exponential_is_within_one_unit_in_the_last_place() -> None:
    values = torch.cat([torch.linspace(-87, 88, 400_001), torch.linspace(-1, 1, 400_001)])
    exact = values.double().exp().numpy()
    ulp = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert (np.abs(exponentials(values).numpy() - exact) / ulp).max() < 1
    assert exponentials(torch.zeros(1)).item() == 1


def test_exponential_of_minus_infinity_is_0_and_of_nan_is_nan() -> None:
    assert exponentials(torch.tensor([-torch.inf, -1e4, -90.0])).tolist() == [0, 0, 0]
    assert exponentials(torch.tensor([0.5] * 16 + [torch.nan] * 17)).isnan().tolist() == [False] * 16 + [True] * 17


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mirrored", [False, True])
def test_exp_and_sum(shape: tuple[int, int], mirrored: bool) -> None:
    s, rows, columns = similarities(*shape), torch.rand(shape[0]), torch.rand(shape[1])
    exact, want_rows, want_columns = s.double().exp(), rows.double(), columns.double()
    exp_and_sum_(exact.log(), want_rows, want_columns if mirrored else None)  # in fp64: by torch's operations
    assert torch.equal(want_rows, rows.double() + exact.log().exp().sum(1))
    exp_and_sum_(s, rows, columns if mirrored else None)
    for got, want in ((s, exact), (rows, want_rows), (columns, want_columns)):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_exp_and_weigh(shape: tuple[int, int]) -> None:
    s, rows, columns = similarities(*shape), torch.rand(shape[0]), torch.rand(shape[1])
    exact = s.double()
    exp_and_weigh_(exact, rows.double(), columns.double())  # in fp64: by torch's operations
    want = s.double().exp() * (rows.double()[:, None] + columns.double())
    torch.testing.assert_close(exact, want, rtol=1e-12, atol=0)
    exp_and_weigh_(s, rows, columns)
    torch.testing.assert_close(s.double(), want, rtol=1e-6, atol=0)


def test_only_the_slices_given_are_changed() -> None:
    """The sums are views of longer tensors."""
    total = torch.zeros(12)
    exp_and_sum_(torch.zeros(4, 2), total[3:7], total[8:10])
    assert total.tolist() == [0, 0, 0, 2, 2, 2, 2, 0, 4, 4, 0, 0]
