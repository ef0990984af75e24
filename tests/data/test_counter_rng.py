"""The counter-based generator: its bits, its two forms, and what they depend on."""

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from kilobatch.data import tensor_rng
from kilobatch.data.counter_rng import key, mix, uniform
from kilobatch.data.numba_jit import exact, fast
from kilobatch.data.tensor_rng import STEP_SALT, as_int64, child, keys, mix_batch, sample_keys, shift_right, uniforms


def test_is_splitmix64():
    """The first outputs of the authors' generator (Vigna's splitmix64.c) from state 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [uniform(1234567, k) for k in range(4)] == [(x >> 11) / 2**53 for x in published]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 3), (2**63 + 12345, 10**6), (2**64 - 1, 99), (-1, 1)])
def test_batched_form_has_the_bits_of_the_scalar_form(seed: int, epoch: int):
    index = torch.randint(0, 2**40, (500,), generator=torch.Generator().manual_seed(0))
    batched = keys(seed, epoch, index, 3)
    scalar = [[int(key(np.uint64(seed % 2**64), epoch, int(i), v)) for v in range(3)] for i in index]
    assert batched.shape == (500, 3)
    assert batched.numpy().view(np.uint64).tolist() == scalar

    draws = torch.tensor([0, 1, 63, 64, 159])
    values = uniforms(batched[:, 0, None], draws)
    assert values.tolist() == [[uniform(np.uint64(row[0]), int(k)) for k in draws] for row in scalar]


@pytest.mark.parametrize(("seed", "step"), [(0, 0), (2**64 - 1, 10**6), (-1, 1)])
def test_a_step_has_keys_of_its_own(seed: int, step: int):
    names = torch.randint(0, 2**40, (50,), generator=torch.Generator().manual_seed(0))
    state = mix(np.uint64(mix(np.uint64((seed ^ STEP_SALT) % 2**64))) ^ np.uint64(step))
    scalar = [int(mix(np.uint64(state) ^ np.uint64(int(name)))) for name in names]
    assert sample_keys(seed, step, names).numpy().view(np.uint64).tolist() == scalar
    assert not {*sample_keys(seed, step, names).tolist()} & {*keys(seed, step, names, 4).flatten().tolist()}


def test_a_child_is_told_from_its_siblings_and_its_parent():
    parents = sample_keys(3, 0, torch.arange(100))
    below = [child(parents, 1), child(parents, 2), child(parents, 1, 2), child(parents, 2, 1), parents]
    assert len({*torch.cat(below).tolist()}) == 500
    counted = child(parents[:, None], 1, torch.arange(5))  # (100, 5)
    assert torch.equal(counted[:, 2], child(parents, 1, 2))
    assert torch.equal(child(parents, 7), mix_batch(parents ^ mix_batch(torch.tensor(7))))


def test_a_key_differs_by_each_of_its_parts():
    parts = list(itertools.product(range(4), range(5), range(100), range(4)))
    assert len({int(key(*part)) for part in parts}) == len(parts)


def test_keys_do_not_depend_on_the_place_in_the_batch():
    index = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(keys(5, 2, index, 2), keys(5, 2, torch.arange(1000), 2)[index], rtol=0, atol=0)


@pytest.mark.parametrize("axis", ["draws", "indices", "views", "epochs", "seeds"])
def test_values_are_uniform_along_each_axis(axis: str):
    n = 20000
    index = torch.tensor([17])
    values = {
        "draws": lambda: uniforms(keys(1, 0, index, 1), torch.arange(n)).flatten(),
        "indices": lambda: uniforms(keys(1, 0, torch.arange(n), 1), torch.tensor(3)).flatten(),
        "views": lambda: uniforms(keys(1, 0, index, n), torch.tensor(3)).flatten(),
        "epochs": lambda: torch.tensor([uniform(np.uint64(key(1, e, 17, 0)), 3) for e in range(n)]),
        "seeds": lambda: torch.tensor([uniform(np.uint64(key(s, 0, 17, 0)), 3) for s in range(n)]),
    }[axis]()
    assert values.min() >= 0 and values.max() < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3
    neighbours = np.corrcoef(values[:-1].numpy(), values[1:].numpy())[0, 1]
    assert abs(neighbours) < 4 / n**0.5


def test_the_logical_shift_brings_in_zeros():
    assert shift_right(torch.tensor(-1), 30).item() == (2**64 - 1) >> 30
    assert as_int64(2**64 - 1) == -1
    assert as_int64(2**63 - 1) == 2**63 - 1


@exact
def multiply_add(a: float, b: float, c: float) -> float:
    return a * b + c


@fast
def in_fast_code(a: float, b: float, c: float) -> float:
    return multiply_add(a, b, c)


def test_exact_functions_stay_exact_where_fast_code_compiled_them_first():
    """numba hands a caller's options down, and a fused multiply-add gives other bits than Python's two steps."""
    numbers = np.random.default_rng(0).random((1000, 3)).tolist()
    from_fast = [in_fast_code(*abc) for abc in numbers]  # compiles both
    assert [multiply_add(*abc) for abc in numbers] == from_fast == [a * b + c for a, b, c in numbers]


def test_each_place_is_used_once():
    """A second use would draw the same numbers again."""
    text = Path(tensor_rng.__file__).read_text("utf-8")
    places = re.findall(r"^(\w+) = ", text.partition("# Places")[2].partition("\n\n\n")[0], re.MULTILINE)
    assert "NETWORK" in places and len({getattr(tensor_rng, name) for name in places}) == len(places)
    root = Path(__file__).resolve().parents[2]
    sources = [path for folder in ("data", "methods", "trainer", "launch") for path in (root / folder).rglob("*.py")]
    code = "\n".join(path.read_text("utf-8") for path in sources)
    for name in places:
        uses = re.findall(rf"\b(?:child|uniforms)\(.*\b{name}\b", code)
        assert len(uses) == 1, (name, uses)
