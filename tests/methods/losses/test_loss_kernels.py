"""The losses' kernels in Triton's interpreter, and compiled; halves in torch's operations. The references are fp64."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kilobatch.methods import collectives
from kilobatch.methods.losses.contrastive import info_nce, nt_xent
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.options import Operands
from tests.helpers import plain_queue
from tests.helpers.process_groups import run_ranks
from tests.methods.losses.test_nt_xent import plain, views

pytest.importorskip("triton", reason="no triton for this system", exc_type=ImportError)

ALL: tuple[Operands, ...] = ("fp32", "tf32", "bf16", "fp16")
BOUNDED, CAREFUL = 0.1, 0.02  # temperatures: plain exponentials, and with a maximum taken out
# Largest relative errors allowed of a loss or a gradient at temperature 0.1; similarities, and with them rounding
# errors, grow as it falls. In the interpreter tf32 is fp32, and bf16 are truncated instead of rounded to the nearest.
LIMITS = {"fp32": 1e-6, "tf32": 1e-6, "bf16": 8e-3, "fp16": 6e-4}

# Names of the kernels' arguments.
FP32_ARGUMENTS = ("u", "weights", "positive_weights", "scale", "du", "sums", "partial_sums", "maxima", "initial_max")

Errors = dict[tuple[Any, ...], tuple[float, float]]  # of loss and gradient; by loss, operands, temperature, ...


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def own_part(x: Tensor) -> Tensor:
    return x.detach().chunk(collectives.world_size())[collectives.rank()].float()


def average_over_ranks(gradients: Tensor) -> Tensor:
    """The engine's average over ranks: from each rank's rows, the gradient of the global mean for the rows of all."""
    return collectives.gather(gradients) / collectives.world_size()


def nt_xent_errors(n: int, dim: int, operands: Operands, temperature: float | Tensor) -> tuple[float, float]:
    """n pairs over all ranks."""
    z = views(n, dim)
    z1, z2 = (own_part(x).requires_grad_() for x in z)
    loss = nt_xent(z1, z2, temperature, operands=operands)
    expected = plain(*z, temperature)
    reference_inputs, inputs = ([*z], [z1, z2])
    if isinstance(temperature, Tensor):
        reference_inputs, inputs = [*z, temperature], [z1, z2, temperature]
    want, got = torch.autograd.grad(expected, reference_inputs), torch.autograd.grad(loss, inputs)
    errors = [error(average_over_ranks(g), w) for g, w in zip(got[:2], want[:2], strict=True)]
    errors += [error(collectives.mean(g), w) for g, w in zip(got[2:], want[2:], strict=True)]
    return error(collectives.mean(loss), expected), max(errors)


def queue_errors(n: int, dim: int, stored: str, operands: Operands, temperature: float) -> tuple[float, float]:
    """n queries over all ranks, against 150 keys."""
    torch.manual_seed(0)
    queue = Queue(QueueOptions.model_validate({"length": 150, "dtype": stored, "placement": "sharded"}), dim)
    q, k = plain_queue.pairs(n, dim, spread=4)  # with this spread many keys are nearer than the query's own
    mine = own_part(q).requires_grad_()
    loss = info_nce(mine, own_part(k), queue, temperature, operands=operands)
    q.requires_grad_()
    expected = plain_queue.plain(q, k, collectives.gather(queue.keys.float()).double(), temperature)
    want, got = torch.autograd.grad(expected, q)[0], torch.autograd.grad(loss, mine)[0]
    return error(collectives.mean(loss), expected), error(average_over_ranks(got), want)


def all_losses(n: int, dim: int) -> Errors:
    """Errors of both losses, on any number of ranks."""
    found: Errors = {}
    for operands, t in itertools.product(ALL, (BOUNDED, CAREFUL)):
        found["nt_xent", operands, t, n, dim] = nt_xent_errors(n, dim, operands, t)
        found["queue", operands, t, n, dim] = queue_errors(n, dim, "fp32", operands, t)
    learnt = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    found["learnt", "fp32", BOUNDED, n, dim] = nt_xent_errors(n, dim, "fp32", learnt)
    found["queue of halves", "bf16", BOUNDED, n, dim] = queue_errors(n, dim, "bf16", "bf16", BOUNDED)
    return found


def on_one_rank() -> Errors:
    found = all_losses(3, 16) | all_losses(67, 24)  # split columns; several row programs, and no power of 2
    found["with a queue", "fp32", BOUNDED] = nt_xent_with_queue()
    found["without", "fp32", BOUNDED] = with_excluded_keys()
    return found


def nt_xent_with_queue() -> tuple[float, float]:
    """Errors of NT-Xent with the keys of a queue; the reference is torch's operations, which compute fp64."""
    queue = Queue(QueueOptions(length=20), 8)
    z = [x.detach().requires_grad_() for x in views(5, 8)]
    half = [x.detach().float().requires_grad_() for x in z]
    want, got = nt_xent(*z, 0.1, queue=queue.double()), nt_xent(*half, 0.1, queue=queue.float())  # pyright: ignore
    each = zip(torch.autograd.grad(got, half), torch.autograd.grad(want, z), strict=True)
    return error(got, want), max(error(g, w) for g, w in each)


def with_excluded_keys() -> tuple[float, float]:
    """Errors of sums without the excluded keys, one of which would be the nearest."""
    from kilobatch.methods.losses.kernels.info_nce import sums, sums_with_shift

    q, keys = plain_queue.unit(7, 8, seed=1).float() / 0.1, plain_queue.unit(70, 8, seed=2).float()
    excluded = torch.tensor([-1, 0, 69, 3, 3, -70, 64])
    excluded[6] = (q @ keys.T)[6].argmax()
    e = (q.double() @ keys.double().T).exp()
    for i, j in enumerate(excluded.tolist()):
        e[i, max(j, 0)] *= j < 0
    want = torch.cat([e @ keys.double(), e.sum(1, keepdim=True)], 1)
    found, shift = sums_with_shift(q, keys, torch.full((7,), -torch.inf), excluded, "fp32")
    return error(sums(q, keys, excluded, "fp32"), want), error(found.double() * shift.double().exp()[:, None], want)


@pytest.fixture(scope="module")
def errors() -> Iterator[list[Errors]]:
    """Errors of the interpreted kernels, on one rank and on three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield [
            run_ranks(1, by_kernels, on_one_rank, timeout=300)[0],
            run_ranks(3, by_kernels, all_losses, 33, 24, timeout=300)[0],
        ]


def by_kernels(found: Any, *arguments: int) -> Errors:
    """Calls compute(*arguments), and asserts that the log names the kernels once for each loss and operand."""
    import logging

    messages: list[str] = []
    log = logging.getLogger("kilobatch")
    log.setLevel(logging.INFO)
    log.addFilter(lambda record: messages.append(record.getMessage()) or True)
    errors = found(*arguments)
    from_kernels = [m for m in messages if m.endswith("Triton's kernels, interpreted")]
    assert len(from_kernels) == len(set(from_kernels)) == 2 * len(ALL), messages
    return errors


def test_kernels_give_loss_and_gradient_of_the_formula(errors: list[Errors]) -> None:
    for found in errors:
        for case, (loss, gradient) in found.items():
            _, operands, temperature, *_ = case
            limit = LIMITS[operands] * BOUNDED / temperature
            assert loss <= limit and gradient <= limit, (case, loss, gradient)


def test_halves_are_what_was_computed_with(errors: list[Errors]) -> None:
    """Errors of bf16 and fp16 are larger than those of fp32: the products were computed in them."""
    for found in errors:
        for case, (_, gradient) in found.items():
            assert (gradient > 2e-5) == (case[1] in ("bf16", "fp16")), (case, gradient)


@pytest.mark.parametrize("n", [40, 300])
@pytest.mark.parametrize("temperature", [BOUNDED, CAREFUL])
def test_bf16_by_torchs_operations(n: int, temperature: float) -> None:
    z1, z2 = views(n, 64)
    halves = [x.detach().float().requires_grad_() for x in (z1, z2)]
    loss, expected = nt_xent(halves[0], halves[1], temperature, operands="bf16"), plain(z1, z2, temperature)
    each = zip(torch.autograd.grad(loss, halves), torch.autograd.grad(expected, (z1, z2)), strict=True)
    limit = LIMITS["bf16"] * BOUNDED / temperature
    assert 0 < error(loss, expected) < limit
    assert 1e-4 < max(error(g, w) for g, w in each) < limit


@pytest.mark.parametrize(("temperature", "limit"), [(BOUNDED, 8e-3), (CAREFUL, 8e-2)])
def test_a_queue_of_bf16_by_torchs_operations(temperature: float, limit: float) -> None:
    """Similarities up to 1 / temperature are bf16, too, which is too coarse for small temperatures."""
    loss, gradient = queue_errors(40, 64, "bf16", "bf16", temperature)
    assert loss < limit and 1e-4 < gradient < limit


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("operands", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("dim", [128, 256])
def test_kernels_compile_for_gpus_and_fit_them(dim: int, operands: Operands, capability: int) -> None:
    from kilobatch.methods.losses.kernels import info_nce as info_nce_kernels
    from kilobatch.methods.losses.kernels import nt_xent as nt_xent_kernels
    from kilobatch.methods.losses.kernels.blocks import kernel_options
    from tests.helpers.ptxas import SHARED_MEMORY, assert_fits, build

    of_operand = "*bf16" if operands == "bf16" else "*fp32"
    rows = dict.fromkeys(FP32_ARGUMENTS, "*fp32")
    rows |= {"excluded": "*i64"} | dict.fromkeys(("own", "all_rows", "scaled", "keys"), of_operand)
    for kernel, types in (
        (nt_xent_kernels._negatives, rows | {"u": of_operand}),
        (nt_xent_kernels._gradient, rows),
        (info_nce_kernels._sums, rows),
        (info_nce_kernels._sums, rows | {"keys": "*bf16"}),  # stored so, and widened
    ):
        for online_max in (False, True) if operands == "bf16" else (True,):
            values = kernel_options(dim, operands, SHARED_MEMORY[capability]) | {
                "ONLINE_MAX": online_max,
                "EXCLUDE": online_max,
            }
            values = {name: x for name, x in values.items() if name in kernel.arg_names or name.islower()}
            built = build(kernel, types, values, capability)
            assert_fits(built, operands, capability, (kernel, online_max))
