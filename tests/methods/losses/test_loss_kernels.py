"""The losses' kernels in Triton's interpreter, and compiled; halves in torch's operations. The references are fp64."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kilobatch.methods import collectives as across
from kilobatch.methods.losses.contrastive import info_nce, nt_xent
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.options import Operands
from tests.helpers import plain_queue as queues
from tests.helpers.process_groups import run_ranks
from tests.methods.losses.test_nt_xent import plain, views

pytest.importorskip("triton", reason="no triton for this system", exc_type=ImportError)

ALL: tuple[Operands, ...] = ("fp32", "tf32", "bf16", "fp16")
BOUNDED, CAREFUL = 0.1, 0.02  # temperatures: plain exponentials, and with a maximum taken out
# Largest relative errors allowed of a loss or a gradient at temperature 0.1; similarities, and with them what rounding
# takes, grow as it falls. tf32 is fp32 in the interpreter, and its bf16 are cut off instead of rounded to the nearest.
LIMITS = {"fp32": 1e-6, "tf32": 1e-6, "bf16": 8e-3, "fp16": 6e-4}

Errors = dict[tuple[Any, ...], tuple[float, float]]  # of loss and gradient; by loss, operands, temperature, ...


def error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def own(x: Tensor) -> Tensor:
    return x.detach().chunk(across.size())[across.rank()].float()


def of_all(gradients: Tensor) -> Tensor:
    """The engine's average: every rank's rows of the gradient of the global mean, from each rank's own."""
    return across.gather(gradients) / across.size()


def of_nt_xent(n: int, dim: int, operands: Operands, temperature: float | Tensor) -> tuple[float, float]:
    """n pairs over all ranks."""
    z = views(n, dim)
    z1, z2 = (own(x).requires_grad_() for x in z)
    loss = nt_xent(z1, z2, temperature, operands=operands)
    expected = plain(*z, temperature)
    wanted, asked = ([*z], [z1, z2])
    if isinstance(temperature, Tensor):
        wanted, asked = [*z, temperature], [z1, z2, temperature]
    want, got = torch.autograd.grad(expected, wanted), torch.autograd.grad(loss, asked)
    errors = [error(of_all(g), w) for g, w in zip(got[:2], want[:2], strict=True)]
    errors += [error(across.mean(g), w) for g, w in zip(got[2:], want[2:], strict=True)]
    return error(across.mean(loss), expected), max(errors)


def of_queue(n: int, dim: int, stored: str, operands: Operands, temperature: float) -> tuple[float, float]:
    """n queries over all ranks, against 150 keys."""
    torch.manual_seed(0)
    queue = Queue(QueueOptions.model_validate({"length": 150, "dtype": stored, "placement": "sharded"}), dim)
    q, k = queues.pairs(n, dim, spread=4)  # so that many keys are nearer than the query's own
    mine = own(q).requires_grad_()
    loss = info_nce(mine, own(k), queue, temperature, operands=operands)
    q.requires_grad_()
    expected = queues.plain(q, k, across.gather(queue.keys.float()).double(), temperature)
    want, got = torch.autograd.grad(expected, q)[0], torch.autograd.grad(loss, mine)[0]
    return error(across.mean(loss), expected), error(of_all(got), want)


def both(n: int, dim: int) -> Errors:
    """On any number of ranks."""
    found: Errors = {}
    for operands, t in itertools.product(ALL, (BOUNDED, CAREFUL)):
        found["nt_xent", operands, t, n, dim] = of_nt_xent(n, dim, operands, t)
        found["queue", operands, t, n, dim] = of_queue(n, dim, "fp32", operands, t)
    learnt = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
    found["learnt", "fp32", BOUNDED, n, dim] = of_nt_xent(n, dim, "fp32", learnt)
    found["queue of halves", "bf16", BOUNDED, n, dim] = of_queue(n, dim, "bf16", "bf16", BOUNDED)
    return found


def alone() -> Errors:
    found = both(3, 16) | both(67, 24)  # programs that split the columns; several by rows, a dimension of no power of 2
    found["with a queue", "fp32", BOUNDED] = with_a_queue()
    found["without", "fp32", BOUNDED] = without()
    return found


def with_a_queue() -> tuple[float, float]:
    """NT-Xent with a memory's keys besides; fp64 is left to torch's operations."""
    queue = Queue(QueueOptions(length=20), 8)
    z = [x.detach().requires_grad_() for x in views(5, 8)]
    half = [x.detach().float().requires_grad_() for x in z]
    want, got = nt_xent(*z, 0.1, queue=queue.double()), nt_xent(*half, 0.1, queue=queue.float())  # pyright: ignore
    each = zip(torch.autograd.grad(got, half), torch.autograd.grad(want, z), strict=True)
    return error(got, want), max(error(g, w) for g, w in each)


def without() -> tuple[float, float]:
    """A key that does not count for a query; also one that would be the largest."""
    from kilobatch.methods.losses.kernels.info_nce import careful_sums, sums

    q, keys = queues.unit(7, 8, seed=1).float() / 0.1, queues.unit(70, 8, seed=2).float()
    out = torch.tensor([-1, 0, 69, 3, 3, -70, 64])
    out[6] = (q @ keys.T)[6].argmax()
    e = (q.double() @ keys.double().T).exp()
    for i, j in enumerate(out.tolist()):
        e[i, max(j, 0)] *= j < 0
    want = torch.cat([e @ keys.double(), e.sum(1, keepdim=True)], 1)
    found, shift = careful_sums(q, keys, torch.full((7,), -torch.inf), out, "fp32")
    return error(sums(q, keys, out, "fp32"), want), error(found.double() * shift.double().exp()[:, None], want)


@pytest.fixture(scope="module")
def errors() -> Iterator[list[Errors]]:
    """By the kernels, interpreted: on one rank, and on three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield [run_ranks(1, told, alone, timeout=300)[0], run_ranks(3, told, both, 33, 24, timeout=300)[0]]


def told(found: Any, *arguments: int) -> Errors:
    """found(*arguments), by kernels, which said so once for each loss and operand."""
    import logging

    messages: list[str] = []
    log = logging.getLogger("kilobatch")
    log.setLevel(logging.INFO)
    log.addFilter(lambda record: messages.append(record.getMessage()) or True)
    errors = found(*arguments)
    by_kernels = [m for m in messages if m.endswith("Triton's kernels, interpreted")]
    assert len(by_kernels) == len(set(by_kernels)) == 2 * len(ALL), messages
    return errors


def test_kernels_give_loss_and_gradient_of_the_formula(errors: list[Errors]) -> None:
    for found in errors:
        for case, (loss, gradient) in found.items():
            _, operands, temperature, *_ = case
            limit = LIMITS[operands] * BOUNDED / temperature
            assert loss <= limit and gradient <= limit, (case, loss, gradient)


def test_halves_are_what_was_computed_with(errors: list[Errors]) -> None:
    """Not fp32 under another name."""
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
    """Whose similarities, up to 1 / temperature, come in bf16 too: not for small temperatures."""
    loss, gradient = of_queue(40, 64, "bf16", "bf16", temperature)
    assert loss < limit and 1e-4 < gradient < limit


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 90])
@pytest.mark.parametrize("operands", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("dim", [128, 256])
def test_kernels_compile_for_gpus_and_fit_them(dim: int, operands: Operands, capability: int) -> None:
    from kilobatch.methods.losses.kernels import info_nce as of_memory
    from kilobatch.methods.losses.kernels import nt_xent as of_batch
    from kilobatch.methods.losses.kernels.blocks import options
    from tests.helpers.ptxas import ROOM, assert_fits, build

    of_operand = "*bf16" if operands == "bf16" else "*fp32"
    rows = dict.fromkeys(("u", "weights", "minus", "scale", "du", "sums", "found", "tops", "start_at"), "*fp32")
    rows |= {"without": "*i64"} | dict.fromkeys(("own", "every", "scaled", "keys"), of_operand)
    for kernel, types in (
        (of_batch._negatives, rows | {"u": of_operand}),
        (of_batch._gradient, rows),
        (of_memory._sums, rows),
        (of_memory._sums, rows | {"keys": "*bf16"}),  # stored so, and widened
    ):
        for careful in (False, True) if operands == "bf16" else (True,):
            values = options(dim, operands, ROOM[capability]) | {"CAREFUL": careful, "WITHOUT": careful}
            values = {name: x for name, x in values.items() if name in kernel.arg_names or name.islower()}
            built = build(kernel, types, values, capability)
            assert_fits(built, operands, capability, (kernel, careful))
