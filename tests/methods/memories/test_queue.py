"""The queue and its loss in one process."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kilobatch.data.errors import UserError
from kilobatch.methods.losses.contrastive import info_nce
from kilobatch.methods.memories.options import SHARDED_FROM, QueueOptions, bytes_held, bytes_sent, share
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.options import OptionContext
from kilobatch.methods.tiles.torch_ops import CPU_TILE
from tests.helpers.plain_queue import pairs, plain, precise, rows, start, unit
from tests.methods.losses.test_nt_xent import Largest

ROWS, COLUMNS = CPU_TILE


def queue(length: int, dim: int, computed: torch.dtype = torch.float64, **options: str) -> Queue:
    torch.manual_seed(0)
    return Queue(QueueOptions.model_validate({"length": length, **options}), dim).to(computed)


def gradient(loss: Tensor, q: Tensor) -> Tensor:
    return torch.autograd.grad(3 * loss, q)[0]


@pytest.mark.parametrize("n", [1, 5, ROWS, ROWS + 1])
@pytest.mark.parametrize("length", [7, COLUMNS, 2 * COLUMNS + 77])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_loss_and_gradient_equal_autograd(n: int, length: int, temperature: float) -> None:
    """For plain exponentials and for an online maximum, with one tile and with many, full and partial."""
    memory, (q, k) = queue(length, 16), pairs(n, 16)
    q.requires_grad_()
    ours, theirs = info_nce(q, k, memory, temperature), precise(q, k, memory.keys, temperature)
    assert_close(ours, plain(q, k, memory.keys, temperature), rtol=1e-12, atol=1e-15)
    want = gradient(theirs, q)
    assert (gradient(ours, q) - want).norm() <= 1e-12 * want.norm()


def test_pushing_does_not_change_a_gradient_computed_afterwards() -> None:
    memory, (q, k) = queue(32, 8), pairs(4, 8)
    q.requires_grad_()
    want = gradient(plain(q, k, memory.keys.clone(), 0.2), q)
    loss = info_nce(q, k, memory, 0.2)
    memory.push(k)
    assert_close(gradient(loss, q), want)


def test_the_key_gets_no_gradient() -> None:
    memory, (q, k) = queue(32, 8), pairs(4, 8)
    k.requires_grad_()
    info_nce(q.requires_grad_(), k, memory, 0.2).backward()
    assert k.grad is None and q.grad is not None


@pytest.mark.parametrize("temperature", [0.02, 0.03])
def test_tiny_loss_keeps_its_digits_in_fp32(temperature: float) -> None:
    """At a loss for which the usual cross-entropy has no correct digit; on both sides of the largest exponent."""
    memory, (q, k) = queue(4096, 512, torch.float32), pairs(64, 512, spread=0.1)
    q32, k32, q = q.float().requires_grad_(), k.float(), q.float().double().requires_grad_()
    exact = precise(q, k32.double(), memory.keys.double(), temperature)
    assert 1e-18 < exact < 1e-9
    assert abs(plain(q32, k32, memory.keys, temperature).double() / exact - 1) > 0.5
    ours = info_nce(q32, k32, memory, temperature)
    assert abs(ours.double() / exact - 1) < 1e-5
    want = gradient(exact, q)
    assert (gradient(ours, q32) - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("temperature", [0.001, 0.02, 0.2])
def test_nothing_overflows(temperature: float) -> None:
    """With a positive that is the query itself or its opposite, and with the query among the keys."""
    memory, q = queue(64, 8, torch.float32), unit(3, 8, seed=0, dtype=torch.float32).requires_grad_()
    memory.push(q.detach()[:1])
    for k in (q.detach(), -q.detach()):
        ours, theirs = info_nce(q, k, memory, temperature), plain(q, k, memory.keys, temperature)
        assert_close(ours, theirs)
        assert gradient(ours, q).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_fp32_whatever_the_autocast(dtype: torch.dtype) -> None:
    name = {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    memory, (q, k) = queue(3 * COLUMNS + 5, 32, dtype, dtype=name), pairs(16, 32)
    memory.push(k)
    q, k = q.to(dtype).requires_grad_(), k.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = info_nce(q, k, memory, 0.1)
    assert memory.keys.dtype == dtype and loss.dtype == torch.float32
    wide = q.detach().double().requires_grad_()
    exact = plain(wide, k.double(), memory.keys.double(), 0.1)
    assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    want, got = gradient(exact, wide), gradient(loss, q)
    assert got.dtype == dtype and (got.double() - want).norm() < torch.finfo(dtype).eps * want.norm()


@pytest.mark.parametrize("temperature", [0.02, 0.1])
def test_no_matrix_of_all_similarities(temperature: float) -> None:
    memory, (q, k) = queue(16_384, 8, torch.float32), pairs(1024, 8)
    q, k = q.float().requires_grad_(), k.float()
    with Largest() as seen:
        info_nce(q, k, memory, temperature).backward()
    assert seen.elements <= max(memory.keys.numel(), ROWS * COLUMNS)
    with Largest() as seen:
        plain(q, k, memory.keys, temperature).backward()
    assert seen.elements >= 1024 * 16_384


@pytest.mark.parametrize("length", [12, 10, 4])
def test_first_in_first_out(length: int) -> None:
    memory, reference = queue(length, 4), start(length, 4)
    for step in range(12):
        keys = unit(4, 4, seed=step)
        memory.push(keys)
        reference = (reference + list(keys))[-length:]
        assert rows(memory.keys) == rows(reference)


def test_more_keys_than_it_holds_leave_the_newest() -> None:
    memory, keys = queue(3, 4), unit(8, 4, seed=0)
    memory.push(unit(1, 4, seed=1))
    memory.push(keys)
    assert rows(memory.keys) == rows(keys[-3:])
    memory.push(unit(2, 4, seed=2))
    assert rows(memory.keys) == rows(torch.cat([keys[-1:], unit(2, 4, seed=2)]))


@pytest.mark.parametrize("temperature", [0.02, 0.2])
def test_an_empty_start_counts_only_what_was_pushed(temperature: float) -> None:
    memory, (q, k) = queue(10, 8, start="empty"), pairs(4, 8)
    q.requires_grad_()
    loss = info_nce(q, k, memory, temperature)
    assert loss == 0 and (gradient(loss, q) == 0).all()  # the positive is the only choice
    pushed: list[Tensor] = []
    for step in range(4):
        memory.push(k + step)
        pushed = (pushed + list(k + step))[-10:]
        assert rows(memory.filled()) == rows(pushed)
        assert_close(info_nce(q, k, memory, temperature), plain(q, k, torch.stack(pushed), temperature))


def test_a_random_start_is_of_unit_keys_in_all_directions() -> None:
    keys = queue(9000, 16).keys
    assert_close(keys.norm(dim=1), torch.ones(9000, dtype=torch.float64), rtol=1e-6, atol=0)
    spread = keys.T @ keys / 9000
    assert (spread - torch.eye(16) / 16).abs().max() < 0.005
    assert len(set(map(tuple, keys.tolist()))) == 9000
    torch.manual_seed(1)
    assert (Queue(QueueOptions(length=64), 16).keys.double() @ keys.T).max() < 0.99


def test_wrong_arguments_are_refused() -> None:
    memory, (q, k) = queue(16, 8), pairs(4, 8)
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="temperature"):
            info_nce(q, k, memory, temperature)
    with pytest.raises(UserError, match=r"\(n, 8\); got \(4, 8\) and \(3, 8\)"):
        info_nce(q, k[:3], memory, 0.1)
    with pytest.raises(UserError, match=r"queue.length 64 is less than the 65 keys"):
        QueueOptions(length=64).check(OptionContext(None, None, workers=1, chunks=1, batch=65))
    QueueOptions(length=64).check(OptionContext(None, None, workers=1, chunks=1, batch=64))


def test_bytes_held_and_sent() -> None:
    assert [share(10, rank, 4) for rank in range(4)] == [3, 3, 2, 2]
    assert not QueueOptions(length=SHARDED_FROM - 1).sharded and QueueOptions(length=SHARDED_FROM).sharded
    sharded, whole = (
        QueueOptions.model_validate({"length": 65_536, "placement": p}) for p in ("sharded", "replicated")
    )
    assert bytes_held(sharded, 128, 4) == 65_536 * 128 * 4 // 4 and bytes_held(whole, 128, 4) == 65_536 * 128 * 4
    assert bytes_sent(sharded, 128, 1, 64, 0.2) == bytes_sent(whole, 128, 1, 64, 0.2) == 0
    assert bytes_sent(sharded, 128, 4, 64, 0.2) == 3 * 64 * (128 + 129) * 4
    assert bytes_sent(sharded, 128, 4, 64, 0.02) == 3 * 64 * (128 + 129 + 2) * 4
    assert bytes_sent(whole, 128, 4, 64, 0.2) == 3 * 64 * 128 * 4
