from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import ProcessRaisedException
from torch.testing import assert_close

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.losses.contrastive import nt_xent
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.options import Mode
from tests.helpers.process_groups import run_ranks


def every_collective() -> dict[str, Tensor]:
    r = collectives.rank()
    x = (torch.arange(6.0).view(3, 2) + 10 * r).requires_grad_()
    # Each rank's loss has weights of its own.
    weights = torch.arange(6.0 * collectives.world_size()).view(-1, 2) * (r + 1)
    every = collectives.gather(x)
    (gather_grad,) = torch.autograd.grad((every * weights).sum(), x)
    total = collectives.all_reduce_sum(x)
    (sum_grad,) = torch.autograd.grad((total * (r + 1)).sum(), x)
    (mean_grad,) = torch.autograd.grad((collectives.mean(x) * (r + 1)).sum(), x)
    refused = ""
    try:
        collectives.refuse_unequal(4 + r // 2, "pairs of views", x.device)
    except UserError as error:
        refused = str(error)
    return {
        "every": every.detach(),
        "gather_grad": gather_grad,
        "total": total.detach(),
        "sum_grad": sum_grad,
        "mean_grad": mean_grad,
        "own": collectives.local_rows(3),
        "refused": torch.tensor([c in refused for c in ("[4, 4, 5]", "pairs of views")]),
    }


def test_collectives_and_their_gradients() -> None:
    got = run_ranks(3, every_collective)
    x = torch.cat([torch.arange(6.0).view(3, 2) + 10 * r for r in range(3)])
    for r, of_rank in enumerate(got):
        assert_close(of_rank["every"], x)
        assert_close(of_rank["total"], x.view(3, 3, 2).sum(0))
        own = torch.arange(3) + 3 * r
        assert_close(of_rank["own"], own)
        # backward sums the gradients of the three ranks' losses: (1 + 2 + 3) times the weights, or ones
        assert_close(of_rank["gather_grad"], 6 * torch.arange(18.0).view(9, 2)[own])
        assert_close(of_rank["sum_grad"], torch.full((3, 2), 6.0))
        assert_close(of_rank["mean_grad"], torch.full((3, 2), 2.0))
        assert of_rank["refused"].all()


def repeated_comparisons() -> list[str]:
    """The outcome of each comparison of n. A meta device stands for an accelerator: comparing on it raises an error."""
    r, cpu, accelerator = collectives.rank(), torch.device("cpu"), torch.device("meta")
    got = []
    for n, what, device in (
        (4, "views", cpu),
        (4 + r, "views", accelerator),
        (4 + r, "views", cpu),
        (4, "keys", accelerator),
    ):
        try:
            collectives.refuse_unequal(n, what, device)
            got.append("passed")
        except (UserError, NotImplementedError, RuntimeError) as error:
            got.append(type(error).__name__)
    return got


def test_equal_sizes_are_compared_once_on_an_accelerator() -> None:
    """Once for each `what`; on a CPU every call compares."""
    for got in run_ranks(2, repeated_comparisons):
        assert got[:3] == ["passed", "passed", "UserError"] and got[3] != "passed"


def loss_gradients(z1: Tensor, z2: Tensor, temperature: float, learnable: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    mine = [z.chunk(collectives.world_size())[collectives.rank()].clone().requires_grad_() for z in (z1, z2)]
    t = torch.tensor(temperature, dtype=z1.dtype, requires_grad=True) if learnable else temperature
    loss = nt_xent(mine[0], mine[1], t)
    loss.backward()
    grads = [z.grad for z in mine if z.grad is not None]
    # The average of parameter gradients over ranks multiplies an embedding's gradient by 1 / W.
    return loss.detach(), torch.cat(grads) / collectives.world_size(), t.grad if isinstance(t, Tensor) else None


def all_losses(z1: Tensor, z2: Tensor) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    return [loss_gradients(z1, z2, t, learnable) for t, learnable in LOSSES]


LOSSES = ((0.02, False), (0.1, False), (0.1, True))


def test_nt_xent_over_ranks_is_that_of_one_process() -> None:
    """3 ranks with 300 pairs each, so that tile borders fall anywhere between ranks, views and positives."""
    torch.manual_seed(0)
    z1 = torch.randn(900, 8, dtype=torch.float64)
    z2 = z1 + torch.randn(900, 8, dtype=torch.float64)
    got = run_ranks(3, all_losses, z1, z2)
    for k, want in enumerate(all_losses(z1, z2)):
        assert_close(torch.stack([of_rank[k][0] for of_rank in got]).mean(), want[0], rtol=1e-12, atol=0)
        first = torch.cat([of_rank[k][1].chunk(2)[0] for of_rank in got])
        second = torch.cat([of_rank[k][1].chunk(2)[1] for of_rank in got])
        assert (torch.cat([first, second]) - want[1]).norm() <= 1e-12 * want[1].norm()
        if want[2] is not None:
            assert_close(torch.stack([of_rank[k][2] for of_rank in got]).mean(), want[2], rtol=1e-11, atol=0)


def normalised(x: Tensor, dy: Tensor, mode: Mode, chunks: int) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of a BatchNorm in `chunks` forwards, for this rank's part of x, dy (N, ...)."""
    module = BatchNorm(x.shape[1], mode, center=x.ndim == 4).to(x.dtype)
    with torch.no_grad():
        module.weight += torch.arange(x.shape[1])
    mine = x.chunk(collectives.world_size())[collectives.rank()].clone().requires_grad_()
    y = torch.cat([module(part) for part in mine.chunk(chunks)])
    y.backward(dy.chunk(collectives.world_size())[collectives.rank()])
    batch_norm.commit(module)
    assert mine.grad is not None
    grads = {name: collectives.all_reduce_sum(p.grad) for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": mine.grad, **grads, **dict(module.named_buffers())}


def norm_cases() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [
        (torch.randn(16, 5, 3, 2, dtype=torch.float64) + 3, torch.randn(16, 5, 3, 2, dtype=torch.float64)),
        (torch.randn(16, 5, dtype=torch.float64) * 4 - 2, torch.randn(16, 5, dtype=torch.float64)),
    ]


def norms_of(cases: list[tuple[Tensor, Tensor]], chunks: int) -> list[dict[str, Tensor]]:
    return [r for x, dy in cases for r in (normalised(x, dy, "global", 1), normalised(x, dy, "local", chunks))]


def mixed() -> tuple[Tensor, Tensor, Tensor]:
    """bf16 activations with fp32 parameters, as under autocast."""
    x, dy = norm_cases()[0][0].bfloat16(), norm_cases()[0][1].bfloat16()
    module = BatchNorm(x.shape[1], "global")
    mine = x.chunk(collectives.world_size())[collectives.rank()].clone().requires_grad_()
    y = module(mine)
    y.backward(dy.chunk(collectives.world_size())[collectives.rank()])
    batch_norm.commit(module)
    assert mine.grad is not None
    return y.detach(), mine.grad, module.running_mean


def far_off(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Channels far from zero: by 1000 std, a constant, and a mean of +500 on the first rank and -500 on the second."""
    x, dy = torch.randn(2, 64, 4, 9, generator=torch.Generator().manual_seed(0))
    second = torch.arange(64) >= 32
    x[:, 1] += 1000 + 3.0 * second[:, None]
    x[:, 2] = 1e6 / 3
    x[:, 3] += torch.where(second, -500.0, 500.0)[:, None]
    return x.view(64, 4, 3, 3).to(dtype), dy.view(64, 4, 3, 3).to(dtype)


def norms() -> list[tuple[list[dict[str, Tensor]], tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]]:
    """Statistics summed as few ranks do it, by a gather, and as many do, by an all-reduce."""
    found = []
    for few in (collectives.FEW_RANKS, 1):
        with patch.object(collectives, "FEW_RANKS", few):
            found.append((norms_of(norm_cases(), 2), mixed(), normalised(*far_off(torch.float32), "global", 1)))
    return found


def test_batch_norm_over_ranks_is_that_of_one_process() -> None:
    """Global: outputs, gradients and buffers of the whole batch; local: those of as many chunks as ranks x chunks."""
    for got in zip(*run_ranks(2, norms), strict=True):
        for k, want in enumerate(norms_of(norm_cases(), 4)):
            for name, expected in want.items():
                ranks = [of_rank[0][k][name] for of_rank in got]
                if name in ("y", "dx"):
                    assert_close(torch.cat(ranks), expected, rtol=1e-11, atol=1e-11)
                else:
                    assert torch.equal(ranks[0], ranks[1])
                    assert_close(ranks[0], expected, rtol=1e-11, atol=1e-11)

        halves = zip(*(of_rank[1] for of_rank in got), strict=True)
        y, dx, mean = (torch.cat(x) if x[0].ndim > 1 else x[0] for x in halves)
        assert y.dtype == dx.dtype == torch.bfloat16 and mean.dtype == torch.float32
        whole_y, whole_dx, whole_mean = mixed()
        assert_close(y, whole_y)
        assert_close(dx, whole_dx, rtol=0.03, atol=0.03)
        assert_close(mean, whole_mean, rtol=1e-5, atol=1e-6)

        far, want = [of_rank[2] for of_rank in got], normalised(*far_off(torch.float64), "global", 1)
        assert_close(far[0]["running_var"].double(), want["running_var"], rtol=2e-6, atol=1e-6)
        for name in ("y", "dx"):
            found, expected = torch.cat([of_rank[name] for of_rank in far]), want[name]
            for channel in (0, 1, 3):
                off = (found - expected)[:, channel].norm() / expected[:, channel].norm()
                assert off <= 2e-5, (name, channel)
            assert found.isfinite().all()  # of the constant, torch's own norm makes no more sense in fp32


def fail_on_the_last() -> None:
    if collectives.rank() == 1:
        raise RuntimeError("reason of rank 1")
    collectives.all_reduce_sum(torch.zeros(1))


def test_a_rank_that_raises_fails_the_call() -> None:
    with pytest.raises(ProcessRaisedException, match="reason of rank 1|Connection closed|peer"):
        run_ranks(2, fail_on_the_last)
