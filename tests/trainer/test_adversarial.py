"""Adversarial views: the step with them against one graph by hand, on any ranks x chunks; who may have them."""

from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from kilobatch.data.batch import Batch, make_batch
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.launch.worker.pretrained import build_of_recipe
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts
from kilobatch.methods.networks import batch_norm, keyed_layers
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.keyed_layers import KeyedDropout
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer import adversarial, chunking
from kilobatch.trainer.adversarial import PIXELS, Attack
from kilobatch.trainer.chunking import SHARE, MemoryNeed
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.options import AdversarialOptions, EngineOptions
from kilobatch.trainer.plain_step import PlainEngine
from kilobatch.trainer.step import forward_backward
from tests.helpers.process_groups import run_ranks

SAMPLES, EPSILON, WEIGHT, TEMPERATURE = 12, 0.1, 0.7, 0.2
OPTIONS = AdversarialOptions(epsilon=EPSILON, weight=WEIGHT)


class Case(NamedTuple):
    norm: Mode | None  # None: norms in eval mode
    chunks: int = 1
    keep: int = 0
    dropout: float = 0.0
    recomputes: bool = False
    dtype: torch.dtype = torch.float64


class Dropping(ConvNet):
    """A small network with dropout, whose last part may be computed again."""

    def __init__(self, case: Case) -> None:
        super().__init__(2, case.norm or "local")
        self.recomputes = case.recomputes
        self.last = nn.Sequential(nn.Linear(16, 16), KeyedDropout(case.dropout), batch_norm.BatchNorm(16, self.norm))

    def forward(self, images: Tensor) -> Tensor:
        return self.run(self.last, super().forward(images))


def method(case: Case) -> SimCLR:
    torch.manual_seed(0)
    made = SimCLR(Dropping(case), temperature=TEMPERATURE, dim=8)
    adversarial.add_norms(made)
    for norm in batch_norm.norms(made):  # the two sets differ
        if isinstance(norm.weight, nn.Parameter):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.train(case.norm is not None)
    return made.to(case.dtype)


def whole_batch(dtype: torch.dtype) -> Batch:
    views = torch.randn(SAMPLES, 2, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return make_batch(views.to(dtype), torch.arange(SAMPLES))


def step(case: Case) -> dict[str, Tensor]:
    """The adversarial views of all ranks, the loss, the averaged gradients and the running statistics of a step."""
    made, rank = method(case), collectives.rank()
    batch = whole_batch(case.dtype).chunks(collectives.world_size())[rank]
    engine = PlainEngine(made, len(batch), chunks=case.chunks, keep=case.keep, adversarial=OPTIONS)
    attacked = Attack(made, OPTIONS, engine.autocast).attacked(batch, {}, case.chunks)
    untouched = all(p.grad is None for p in made.parameters())
    untouched &= not any(norm.pending_forwards.any() for norm in batch_norm.norms(made))
    outcome = forward_backward(engine, batch)
    batch_norm.commit(made)
    found = {name: collectives.mean(p.grad) for name, p in made.named_parameters() if p.grad is not None}
    found |= {name: x for name, x in made.state_dict().items() if "running" in name}
    pixels = collectives.gather(attacked.fields[PIXELS].flatten(1))
    assert [*outcome.z] == ["z"] and not outcome.batch.fields  # what update() and the monitor are given
    return {"pixels": pixels, "loss": collectives.mean(outcome.loss), "untouched": torch.tensor(untouched), **found}


def by_hand(case: Case, parts: int = 1) -> dict[str, Tensor]:
    """The same in one process and one graph, as in the paper: the two sides of the attack's pair are embedded apart.
    parts: of the batch, for norms of a part."""
    made, batch = method(case), whole_batch(case.dtype)
    twins = [*made.get_submodule(adversarial.NORMS).children()]
    clean = [norm for norm in batch_norm.norms(made) if norm not in twins]

    def embed(images: Tensor, norms: list[Any]) -> Tensor:
        for norm, stand_in in zip(clean, norms, strict=True):
            norm.forward = stand_in.forward
        found = []
        for x, part in zip(images.chunk(parts), batch.chunks(parts), strict=True):
            with keyed_layers.drawing(made, part.keys):
                found.append(made.head(made.encoder(x)))
        for norm in clean:
            del norm.forward
        return torch.cat(found)

    def loss(a: Tensor, b: Tensor) -> Tensor:
        return made.loss({"z": torch.stack([a, b], 1)}, {}, batch)

    first = batch.views[0][:, 0]
    moving = first.clone().requires_grad_()
    pair = embed(first, twins).detach(), embed(moving, twins)
    (by_pixel,) = torch.autograd.grad(loss(*pair), moving)
    moved = first + EPSILON * by_pixel.sign()
    for norm in twins:
        torch._foreach_zero_([norm.pending_mean, norm.pending_var, norm.pending_forwards])  # pyright: ignore
    a, b = embed(batch.views[0].flatten(0, 1), clean).unflatten(0, (SAMPLES, 2)).unbind(1)
    total = loss(a, b) + WEIGHT * loss(a, embed(moved, twins))
    total.backward()
    batch_norm.commit(made)
    found = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    found |= {name: x for name, x in made.state_dict().items() if "running" in name}
    return {"pixels": moved.flatten(1), "loss": total.detach(), "untouched": torch.tensor(True), **found}


EXACT = {
    1: [
        Case(None, dropout=0.3),
        Case(None, 4, 1, 0.3, recomputes=True),
        Case("global"),
        Case("local", 6, 2, 0.3),
        Case("local", 6, 2, 0.3, recomputes=True),
    ],
    2: [Case(None, 1, 0, 0.3), Case(None, 3, 1, 0.3, recomputes=True), Case("global"), Case("local", 3, 0, 0.3)],
    3: [Case(None, 2, 1, 0.3), Case("global", recomputes=True), Case("local", 2, 1, 0.3, recomputes=True)],
}
ROUNDED = Case(None, 1, dtype=torch.float32)
PARTS = 6  # ranks x chunks of the local cases


def steps(cases: list[Case]) -> dict[Case, dict[str, Tensor]]:
    return {case: step(case) for case in cases}


def on_two() -> dict[str, Any]:
    return {"steps": steps([*EXACT[2], ROUNDED, ROUNDED._replace(chunks=2)]), "deepspeed": trained()}


def trained() -> list[dict[str, Tensor]]:
    """The weights after two steps of a real engine, by ZeRO's stage, in two chunks."""
    found = []
    for zero in (0, 2):
        case = Case("local", dtype=torch.float32, dropout=0.3)
        made, batch = method(case), whole_batch(case.dtype).chunks(collectives.world_size())[collectives.rank()]
        optimizer = torch.optim.SGD(made.parameters(), 0.1, momentum=0.9)
        options = EngineOptions(chunks=2, keep=1, zero=zero, adversarial=OPTIONS)
        engine = Engine(made, optimizer, options, torch.device("cpu"), len(batch))
        for _ in range(2):
            forward_backward(engine, batch)
            engine.step(0.1)
            batch_norm.commit(made)
        found.append({name: x.detach().clone() for name, x in made.state_dict().items()})
    return found


@pytest.fixture(scope="module")
def two() -> dict[str, Any]:
    return run_ranks(2, on_two, timeout=300.0)[0]


@pytest.fixture(scope="module")
def found(two: dict[str, Any]) -> dict[int, dict[Case, dict[str, Tensor]]]:
    return {1: steps([*EXACT[1], ROUNDED]), 2: two["steps"], 3: run_ranks(3, steps, EXACT[3], timeout=300.0)[0]}


@pytest.mark.parametrize(("ranks", "case"), [(ranks, case) for ranks, cases in EXACT.items() for case in cases])
def test_a_step_is_that_of_the_paper_on_any_ranks_and_chunks(
    found: dict[int, dict[Case, dict[str, Tensor]]], ranks: int, case: Case
) -> None:
    """In fp64, where no sign flips: views, loss, gradients of both sets of norms, running statistics."""
    got = found[ranks][case]
    want = by_hand(Case(case.norm, dropout=case.dropout), PARTS if case.norm == "local" else 1)
    assert got.keys() == want.keys() and got["untouched"]
    norm = torch.cat([x.flatten() for x in want.values()]).norm()
    for name, x in want.items():
        assert (got[name].double() - x.double()).norm() <= 1e-11 * norm, name
    assert want["adversarial_norms.0.weight"].abs().max() > 0
    moved = (want["pixels"] - whole_batch(torch.float64).views[0][:, 0].flatten(1)).abs()
    torch.testing.assert_close(moved.amin(), torch.tensor(EPSILON, dtype=torch.float64))


def test_in_fp32_few_signs_flip(found: dict[int, dict[Case, dict[str, Tensor]]]) -> None:
    want = by_hand(ROUNDED._replace(dtype=torch.float64))["pixels"]
    for got in (found[1][ROUNDED], found[2][ROUNDED], found[2][ROUNDED._replace(chunks=2)]):
        flipped = (got["pixels"].double() - want).abs() > EPSILON
        assert flipped.double().mean() < 1e-3
        assert not (flipped & ((got["pixels"].double() - want).abs() > 2.01 * EPSILON)).any()


def test_the_view_is_moved_against_the_loss_and_wrong_ones_are_found_out() -> None:
    case = Case(None)
    right, batch = by_hand(case)["pixels"], whole_batch(case.dtype)
    attack = Attack(method(case), OPTIONS, lambda: torch.autocast("cpu", enabled=False))
    found = attack.attacked(batch, {}, 2)
    torch.testing.assert_close(found.fields[PIXELS].flatten(1), right, rtol=1e-12, atol=1e-12)

    def pair_loss(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            z = [attack.start(batch.replaced(views=(x,)))["z"] for x in (batch.views[0][:, :1], pixels)]
            return attack.method.loss({"z": torch.cat(z, 1)}, {}, batch)

    first, moved = batch.views[0][:, :1], found.fields[PIXELS]
    against, along = (pair_loss(first + sign * 0.01 * (moved - first)) for sign in (1, -1))
    assert against > pair_loss(first) > along

    def share_moved_otherwise(pixels: Tensor) -> float:
        return ((pixels.flatten(1) - right).abs() > EPSILON).double().mean().item()

    second = attack.attacked(batch.replaced(views=(batch.views[0].flip(1),)), {}, 1).fields[PIXELS]
    assert share_moved_otherwise(second - batch.views[0][:, 1:] + first) > 0.1
    for norm in attack.method.get_submodule(adversarial.NORMS).children():
        if isinstance(norm.weight, nn.Parameter):
            nn.init.ones_(norm.weight)
    assert share_moved_otherwise(attack.attacked(batch, {}, 1).fields[PIXELS]) > 0.01  # through other norms


def test_zero_and_deepspeed_train_the_same(two: dict[str, Any]) -> None:
    unsharded, sharded = two["deepspeed"]
    before = method(Case("local", dtype=torch.float32)).state_dict()
    assert not torch.equal(unsharded["adversarial_norms.0.weight"], before["adversarial_norms.0.weight"])
    torch.testing.assert_close(sharded, unsharded, rtol=1e-4, atol=1e-5)


def test_the_choice_of_chunks_counts_the_adversarial_view() -> None:
    """A graph of three views in place of two; the budget that holds 12 samples of two does not hold those of three."""
    made, batch = method(Case("local", dtype=torch.float32)), whole_batch(torch.float32)
    plain = PlainEngine(made, SAMPLES, chunks="auto")
    need = MemoryNeed.measure(made, batch, plain.device, plain.autocast)
    chosen = []
    with mock.patch.object(chunking, "free_memory", lambda device, sharing: int(need.of(SAMPLES, 1) / SHARE) + 1):
        for engine in (plain, PlainEngine(made, SAMPLES, chunks="auto", adversarial=OPTIONS)):
            chosen.append(engine.chunking.decide(batch))
    assert chosen == [(1, 1), (2, 1)]
    assert not any(norm.pending_forwards.any() for norm in batch_norm.norms(made))


def test_the_norms_are_part_of_a_recipes_method() -> None:
    tiny = ["encoder.name=convnet", "encoder.width=2", "engine.adversarial.epsilon=0.01"]
    made = build_of_recipe(resolve_recipe("demo", tiny), DataFacts(100, 10))
    plain = build_of_recipe(resolve_recipe("demo", tiny[:2]), DataFacts(100, 10))
    more = made.state_dict().keys() - plain.state_dict().keys()
    assert more and all(name.startswith("adversarial_norms.") for name in more)
    assert made.encoder.state_dict().keys() == plain.encoder.state_dict().keys()


def test_adversarial_views_need_a_network_that_is_not_compiled() -> None:
    with pytest.raises(ValueError, match="use compile=false"):
        EngineOptions(compile=True, adversarial=OPTIONS)
