"""The step on real DeepSpeed engines: ranks, chunks and kept graphs change no gradient."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kilobatch.methods.networks.batch_norm import commit, norms
from kilobatch.trainer import chunking
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.chunking import MemoryNeed
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.step import check_finite, forward_backward
from tests.helpers.process_groups import run_ranks
from tests.helpers.toy_method import (
    GLOBAL_BATCH,
    Toy,
    batch,
    gradients,
    own_batch,
    plain_loss,
    sgd_engine,
    toy,
    weights,
)

CPU = torch.device("cpu")


def averaged(engine: Engine) -> dict[str, Tensor]:
    """Takes the step, and returns the gradients that the optimizer was given."""
    seen: dict[str, Tensor] = {}
    hook = engine.optimizer.register_step_pre_hook(lambda *_: seen.update(gradients(engine.method)))
    engine.step(0.1)
    hook.remove()
    return seen


def one_step(method: Toy, **options: Any) -> dict[str, Any]:
    """The loss, the averaged gradients and the running statistics of one step."""
    engine = sgd_engine(method, **options)
    torch.manual_seed(5 + dist.get_rank())
    outcome = forward_backward(engine, own_batch())
    counted = [int(m.pending_forwards.item()) for m in norms(method)]
    commit(method)
    seen, draw = averaged(engine), torch.rand(3)
    running = {name: x for name, x in weights(method).items() if "running" in name or "batches" in name}
    return {
        "loss": outcome.loss,
        "z": outcome.z["z"],
        "gradients": seen,
        "running": running,
        "counted": counted,
        "draw": draw,
    }


def kept() -> dict[str, list[dict[str, Any]]]:
    """By precision: steps with dropout and a local norm in four chunks, of which none to all keep their graph."""
    return {
        precision: [
            one_step(toy(batch_norm=True, dropout=0.5), chunks=4, keep=keep, precision=precision)
            for keep in (0, 1, 3, 4)
        ]
        for precision in ("fp32", "bf16")
    }


def kept_under_zero() -> dict[int, list[dict[str, Tensor]]]:
    """By ZeRO stage: the weights after a step in four chunks, of which none or three keep their graph."""
    found: dict[int, list[dict[str, Tensor]]] = {}
    for stage in (0, 1, 2):
        for keep in (0, 3):
            engine = sgd_engine(toy(batch_norm=True), chunks=4, keep=keep, zero=stage)
            forward_backward(engine, own_batch())
            engine.step(0.1)
            found.setdefault(stage, []).append(weights(engine.method))
    return found


def frozen() -> list[dict[str, Tensor]]:
    """The gradients at once and in two chunks, where the loss's own parameter alone is trained."""
    found: list[dict[str, Tensor]] = []
    for chunks in (1, 2):
        method = toy()
        method.encoder.requires_grad_(False)
        forward_backward(sgd_engine(method, chunks=chunks), own_batch())
        found.append(gradients(method))
    return found


def automatic(folder: Path) -> dict[str, Any]:
    """The choice of chunks where the ranks have different free memory, and that of a resumed run with all of it."""
    method = toy(batch_norm=True)
    engine = sgd_engine(method, chunks="auto")
    before, rng_state = weights(method), torch.get_rng_state()
    need = MemoryNeed.measure(method, own_batch(), CPU, engine.autocast)
    free = int((need.of(4, 1), need.of(2, 2))[dist.get_rank()] / chunking.SHARE) + 2
    untouched = all(torch.equal(x, before[name]) for name, x in weights(method).items())
    untouched &= torch.equal(torch.get_rng_state(), rng_state) and not gradients(method)
    with mock.patch.object(chunking, "free_memory", lambda device, sharing: free):
        decided = engine.chunking.decide(own_batch())
    with Checkpoints(folder, CheckpointOptions(), dist.get_rank(), dist.get_world_size()) as checkpoints:
        dist.barrier()  # no rank may save before all have one
        checkpoints.save(1, engine.pieces(), {}, wait=True)
    again = sgd_engine(toy(batch_norm=True, seed=1), chunks="auto")
    again.restore(open_saved(folder / "step-00000001"))
    resumed = again.chunking.decide(own_batch())
    return {
        "decided": decided,
        "resumed": resumed,
        "untouched": untouched,
        "sharing": chunking._ranks_on_this_machine(CPU),
    }


def dropout() -> dict[str, Any]:
    """Chunked gradients, and those of one graph over the same chunks and random numbers; numbers drawn afterwards."""
    engine = sgd_engine(toy(dropout=0.5), chunks=2, keep=0)
    reference = toy(dropout=0.5)
    torch.manual_seed(5 + dist.get_rank())
    plain_loss(reference, own_batch(), chunks=2).backward()
    follows = torch.rand(3)
    expected = gradients(reference)
    for g in expected.values():
        dist.all_reduce(g)
        g /= dist.get_world_size()
    torch.manual_seed(5 + dist.get_rank())
    forward_backward(engine, own_batch())
    same_draws = torch.equal(torch.rand(3), follows)
    return {"expected": expected, "gradients": averaged(engine), "same_draws": same_draws}


def unreached() -> dict[str, Any]:
    """A parameter that no loss reaches, after a step with weight decay."""
    method = toy()
    method.unused = torch.nn.Parameter(torch.full((3,), 2.0))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], 1.0, weight_decay=0.1)
    engine = Engine(method, optimizer, EngineOptions(), CPU, GLOBAL_BATCH // dist.get_world_size())
    forward_backward(engine, own_batch())
    engine.step(0.5)
    return {"unused": method.unused.detach().clone(), "gradients": gradients(method)}


class Reads(TorchDispatchMode):
    """Counts numbers that are read out of tensors, each of which would make the host wait for an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

    def tolist(self, of: Tensor) -> Any:
        self.count += 1
        return of.detach().numpy().tolist()


def waits() -> dict[str, int]:
    """How often a step's parts would make the host wait for an accelerator."""
    engine = sgd_engine(toy(batch_norm=True), chunks=2)
    found: dict[str, int] = {}
    for step in range(2):  # the first one may allocate
        outcome = None
        for part in ("forward_backward", "check_finite", "step"):
            with Reads() as reads, mock.patch.object(Tensor, "tolist", lambda x, to=reads: to.tolist(x)):
                match part:
                    case "forward_backward":
                        outcome = forward_backward(engine, own_batch(step))
                    case "check_finite":
                        assert outcome
                        check_finite(engine, outcome, step, [False])
                    case _:
                        engine.step(0.1)
                        commit(engine.method)
            found[part] = reads.count
    return found


def scenarios(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {f"chunks {c}": one_step(toy(), chunks=c, keep=0) for c in (1, 2, 8)}
    found["batch norm"] = one_step(toy(batch_norm=True), chunks=2, keep=0)
    found["kept"] = kept()
    found["unreached"], found["frozen"] = unreached(), frozen()
    found["waits"] = waits()
    if dist.get_world_size() > 1:
        found |= {"dropout": dropout(), "kept_under_zero": kept_under_zero(), "automatic": automatic(folder)}
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, scenarios, tmp_path_factory.mktemp("two"), timeout=300.0)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(1, scenarios, tmp_path_factory.mktemp("one"), timeout=300.0)


def reference(chunks: int = 1, batch_norm: bool = False) -> Toy:
    method = toy(batch_norm)
    plain_loss(method, batch(), chunks).backward()
    commit(method)
    return method


@pytest.mark.parametrize("world", ["one", "two"])
@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_ranks_and_chunks_change_no_gradient(world: str, chunks: int, request: pytest.FixtureRequest) -> None:
    expected = gradients(reference())
    assert "temperature" in expected and expected["temperature"].abs() > 0.1
    assert not any(name.startswith("teacher") for name in expected)
    ranks = request.getfixturevalue(world)
    for rank in ranks:
        torch.testing.assert_close(rank[f"chunks {chunks}"]["gradients"], expected, rtol=1e-4, atol=1e-5)
    losses = torch.stack([rank[f"chunks {chunks}"]["loss"] for rank in ranks])
    torch.testing.assert_close(losses.mean(), plain_loss(toy(), batch()).detach())
    z = torch.cat([rank[f"chunks {chunks}"]["z"] for rank in ranks])
    torch.testing.assert_close(z, toy().embed(batch())["z"].detach())


def test_local_batch_norm_is_per_chunk_on_any_ranks(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    """1 rank x 2 chunks, and 2 ranks x 2 chunks, against one graph over 2 and 4 chunks; statistics counted once."""
    for ranks, chunks in ((one, 2), (two, 4)):
        method = reference(chunks, batch_norm=True)
        running = {name: x for name, x in weights(method).items() if "running" in name or "batches" in name}
        assert running["encoder.1.num_batches_tracked"] == 1
        for rank in ranks:
            torch.testing.assert_close(rank["batch norm"]["gradients"], gradients(method), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(rank["batch norm"]["running"], running)
            assert rank["batch norm"]["counted"] == [2]  # the first pass of each chunk, not the second


def test_dropout_draws_the_same_in_both_passes(two: list[dict[str, Any]]) -> None:
    for rank in two:
        torch.testing.assert_close(rank["dropout"]["gradients"], rank["dropout"]["expected"], rtol=1e-4, atol=1e-5)
        assert rank["dropout"]["same_draws"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kept_graphs_change_no_bit(one: list[dict[str, Any]], two: list[dict[str, Any]], precision: str) -> None:
    for rank in (*one, *two):
        none, *others = rank["kept"][precision]
        assert none["counted"] == [4] and none["gradients"]["encoder.0.weight"].abs().max() > 0
        for other in others:
            torch.testing.assert_close(other, none, rtol=0, atol=0)


def test_kept_graphs_change_no_bit_under_zero(two: list[dict[str, Any]]) -> None:
    for rank in two:
        (unsharded, _), before = rank["kept_under_zero"][0], weights(toy(batch_norm=True))
        assert not torch.equal(unsharded["encoder.0.weight"], before["encoder.0.weight"])
        for none, three in rank["kept_under_zero"].values():
            torch.testing.assert_close(three, none, rtol=0, atol=0)
            torch.testing.assert_close(none, unsharded, rtol=1e-4, atol=1e-5)


def test_auto_is_agreed_on_and_resumed(two: list[dict[str, Any]]) -> None:
    """Rank 0 has memory for chunks of 4 samples, rank 1 for two graphs of 2: 4 chunks of 2 and 2 graphs fit both."""
    for rank in two:
        assert rank["automatic"]["sharing"] == 2
        assert rank["automatic"]["decided"] == (4, 2)
        assert rank["automatic"]["resumed"] == (4, 4)  # the chunks are the run's, the graphs kept are the machine's
        assert rank["automatic"]["untouched"]


def test_a_parameter_that_no_loss_reaches_decays_on_any_ranks(
    one: list[dict[str, Any]], two: list[dict[str, Any]]
) -> None:
    for rank in (*one, *two):
        torch.testing.assert_close(rank["unreached"]["unused"], torch.full((3,), 2.0 * (1 - 0.5 * 0.1)))
        assert not rank["unreached"]["gradients"]  # dropped with the step


def test_the_host_waits_once_a_step(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> None:
    for rank in (*one, *two):
        assert rank["waits"] == {"forward_backward": 0, "check_finite": 1, "step": 0}


def test_chunks_of_a_frozen_network_leave_the_losss_own_parameters(one: list[dict[str, Any]]) -> None:
    at_once, chunked = one[0]["frozen"]
    assert [*at_once] == [*chunked] == ["temperature"]
    torch.testing.assert_close(chunked, at_once)
