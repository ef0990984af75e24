"""Chance in a step: dropout, drop path and noise are the same on any ranks x chunks, in both passes of a chunk, and in
blocks that are computed again in the backward. torch's own dropout is found out."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from kilobatch.data.batch import Batch, make_batch
from kilobatch.methods import collectives
from kilobatch.methods.networks import batch_norm, keyed_layers
from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.keyed_layers import KeyedDropPath, KeyedNoise
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.plain_step import PlainEngine
from kilobatch.trainer.step import forward_backward
from tests.helpers.process_groups import run_ranks

SAMPLES, WIDTH = 12, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNorm(WIDTH, "local")
        self.mlp = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Dropout(0.3), nn.Linear(WIDTH, WIDTH))
        self.path, self.noise = KeyedDropPath(0.4), KeyedNoise()

    def forward(self, x: Tensor) -> Tensor:
        return self.noise(x + self.path(self.mlp(self.norm(x))), 0.1)


class Tiny(Encoder):
    """(N, 3, 4, 4) -> (N, 8). keyed: whether its nn.Dropout is replaced."""

    def __init__(self, keyed: bool, recomputes: bool) -> None:
        super().__init__()
        self.features, self.norm, self.recomputes = WIDTH, "local", recomputes
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(48, WIDTH))
        self.blocks = nn.ModuleList([Block(), Block()])
        if keyed:
            keyed_layers.use_keyed_layers(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = self.run(block, x)
        return x


class PerView(SimCLR):
    """Embeds a view at a time: two calls, and no row but one of a sample in each."""

    def embed(self, batch: Batch) -> dict[str, Tensor]:
        return {"z": torch.stack([self.head(self.encoder(view)) for view in batch.views[0].unbind(1)], 1)}


class Case(NamedTuple):
    chunks: int = 1
    keep: int = 0
    recomputes: bool = False
    keyed: bool = True
    per_view: bool = False
    fixed: bool = True  # norms in eval mode, so that a sample is normalised alone


def method(case: Case) -> SimCLR:
    torch.manual_seed(0)
    made = (PerView if case.per_view else SimCLR)(Tiny(case.keyed, case.recomputes), temperature=0.2, dim=4)
    for norm in batch_norm.norms(made):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.train(not case.fixed)
    return made


def own_batch(dtype: torch.dtype = torch.float64) -> Batch:
    views = torch.randn(SAMPLES, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return make_batch(views, torch.arange(SAMPLES) + 100).chunks(collectives.world_size())[collectives.rank()]


def step(case: Case) -> dict[str, Tensor]:
    """The averaged gradients of a step in fp64, and the running statistics after it."""
    made, batch = method(case).double(), own_batch()
    torch.manual_seed(9)
    outcome = forward_backward(PlainEngine(made, len(batch), chunks=case.chunks, keep=case.keep), batch)
    batch_norm.commit(made)
    found = {name: collectives.mean(p.grad) for name, p in made.named_parameters() if p.grad is not None}
    found |= {name: x for name, x in made.state_dict().items() if "running" in name or "tracked" in name}
    return {**found, "loss": collectives.mean(outcome.loss)}


def flat(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([x.double().flatten() for x in found.values()])


def with_deepspeed(recomputes: bool) -> dict[str, Tensor]:
    """The averaged gradients of a real engine in two chunks, one of which keeps its graph, in fp32."""
    made, batch = method(Case(recomputes=recomputes)), own_batch(torch.float32)
    optimizer = torch.optim.SGD(made.parameters(), 1.0)
    engine = Engine(made, optimizer, EngineOptions(chunks=2, keep=1), torch.device("cpu"), len(batch))
    forward_backward(engine, batch)
    return {name: collectives.mean(p.grad) for name, p in made.named_parameters() if p.grad is not None}


CASES = {
    1: [Case(1), Case(2), Case(4), Case(12), Case(4, keep=2), Case(1, recomputes=True), Case(4, 2, recomputes=True)],
    2: [Case(1), Case(3), Case(6, keep=5), Case(3, 1, recomputes=True)],
    3: [Case(1), Case(2), Case(4, keep=1), Case(2, recomputes=True)],
}
OTHERS = [
    *[Case(chunks, per_view=True) for chunks in (1, 2)],
    *[Case(chunks, keyed=False) for chunks in (1, 2)],
]


def steps(cases: list[Case]) -> dict[Case, dict[str, Tensor]]:
    return {case: step(case) for case in cases}


def on_two() -> dict[str, Any]:
    local = [Case(chunks, keep, again, fixed=False) for chunks in (1, 3) for keep in (0, 1) for again in (False, True)]
    return {
        "steps": steps([*CASES[2], *OTHERS, *local]),
        "deepspeed": [with_deepspeed(recomputes) for recomputes in (False, True)],
    }


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return run_ranks(2, on_two, timeout=300.0)[0]


@pytest.fixture(scope="module")
def found(two: dict[str, Any]) -> dict[int, dict[Case, dict[str, Tensor]]]:
    return {1: steps([*CASES[1], *OTHERS]), 2: two["steps"], 3: run_ranks(3, steps, CASES[3], timeout=300.0)[0]}


@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks, cases in CASES.items() for case in cases])
def test_chance_is_the_same_on_any_ranks_and_chunks(
    found: dict[int, dict[Case, dict[str, Tensor]]], ranks: int, case: Case
) -> None:
    want, got = flat(found[1][Case(1)]), flat(found[ranks][case])
    assert (got - want).norm() <= 1e-12 * want.norm()


def test_a_call_for_each_view_is_exact_too(found: dict[int, dict[Case, dict[str, Tensor]]]) -> None:
    want = flat(found[1][Case(1, per_view=True)])
    for ranks, chunks in ((1, 2), (2, 1), (2, 2)):
        got = flat(found[ranks][Case(chunks, per_view=True)])
        assert (got - want).norm() <= 1e-12 * want.norm()
    assert (want - flat(found[1][Case(1)])).norm() > 0.01 * want.norm()  # the second view has other numbers


def test_torchs_dropout_is_found_out(found: dict[int, dict[Case, dict[str, Tensor]]]) -> None:
    want = flat(found[1][Case(1, keyed=False)])
    for ranks, chunks in ((1, 2), (2, 1), (2, 2)):
        got = flat(found[ranks][Case(chunks, keyed=False)])
        assert (got - want).norm() > 0.01 * want.norm()


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("keep", [0, 1])
def test_recomputing_changes_no_gradient_and_counts_statistics_once(
    two: dict[str, Any], chunks: int, keep: int
) -> None:
    """With the norms of a chunk, in training mode."""
    plain, again = (two["steps"][Case(chunks, keep, recomputes, fixed=False)] for recomputes in (False, True))
    assert plain["encoder.blocks.0.norm.num_batches_tracked"] == 1
    torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-14)
    statistics = [name for name in plain if "running" in name]
    assert statistics and all(torch.equal(again[name], plain[name]) for name in statistics)


def test_recomputing_changes_no_bit_in_deepspeed(two: dict[str, Any]) -> None:
    plain, again = two["deepspeed"]
    assert plain["encoder.stem.1.weight"].abs().max() > 0
    torch.testing.assert_close(again, plain, rtol=0, atol=0)
