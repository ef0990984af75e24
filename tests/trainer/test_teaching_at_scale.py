"""Students at a global batch of 4096, on 8 ranks of 512 images: two steps are those of one process."""

import pytest
import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import Method
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.distill import Distill
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.methods.papers.seed import SEED
from kilobatch.methods.parity.formulas.finetune import prepared
from kilobatch.methods.parity.standard import GroupShape
from kilobatch.trainer.plain_step import PlainEngine, random_batch
from kilobatch.trainer.step import forward_backward
from tests.helpers.process_groups import run_ranks

RANKS, BATCH, KEYS = 8, 4096, 8192
METHODS = "seed", "distill"


def build(name: str) -> Method:
    """A student with global norms, in fp64, which a network without or with classes teaches."""
    torch.manual_seed(0)
    teacher = prepared(FineTune(ConvNet(1), layer=0))
    if name == "seed":
        student: Method = SEED(ConvNet(1), teacher="", dim=8, queue=QueueOptions(length=KEYS, placement="sharded"))
    else:
        student = prepared(Distill(ConvNet(1), teacher="", alpha=0.7))
    student.load_pretrained(lambda reference: teacher, fresh=True)
    return student.double()


def steps(method: Method, batches: list[Batch]) -> list[Tensor]:
    """The gradient of each step, averaged over ranks; the second step's queue holds the first one's keys."""
    found, world = [], collectives.world_size()
    for whole in batches:
        mine = whole.chunks(world)[collectives.rank()]
        outcome = forward_backward(PlainEngine(method, len(mine)), mine)
        method.update(outcome.z, outcome.t, outcome.batch)
        found.append(collectives.mean(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])))
        method.zero_grad()
    return found


def results() -> dict[str, list[Tensor]]:
    """The gradients of both steps, and the queue's keys in an order of their own."""
    torch.set_num_threads(1)
    label = torch.arange(BATCH) % 3
    batches = [random_batch(BATCH, [GroupShape(1, 8)], label.where(label != chance, -1)) for chance in (0, 1)]
    found = {}
    for name in METHODS:
        method = build(name)
        found[name] = steps(method, batches)
        if isinstance(method, SEED):
            assert method.queue
            keys = collectives.gather(method.queue.keys)
            direction = torch.linspace(1, 2, keys.shape[1], dtype=keys.dtype)
            found[name].append(keys[(keys @ direction).argsort()])
    return found


@pytest.mark.timeout(300)
def test_eight_ranks_of_512_are_one_process() -> None:
    want, got = results(), run_ranks(RANKS, results, timeout=240.0)[0]
    assert got["seed"][-1].shape == (KEYS, 8)
    for name in METHODS:
        for mine, theirs in zip(got[name], want[name], strict=True):
            error = ((mine - theirs).norm() / theirs.norm()).item()
            assert theirs.norm() > 1e-3 and error < 1e-12, (name, error)
