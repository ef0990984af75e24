"""MiCE trains as its authors' code does (ELBO.py, train_MiCE.py), line by line in fp64 and one process; its centres on
any ranks, with gradients, and resumed on other ranks."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kilobatch.data.batch import Batch, Clock, make_batch
from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.losses.experts import expert_log_likelihoods, simplex
from kilobatch.methods.memories.cluster_sums import ClusterSums
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.mice import MiCE
from tests.helpers.process_groups import run_ranks

SAMPLES, STEPS, EPOCHS, EXPERTS, DIM, KEYS, TAU, KAPPA, MOMENTUM, LR = 12, 3, 3, 4, 6, 36, 0.5, 0.3, 0.9, 0.3
NO_FEATURES: Any = None  # the hook asks for none


def batch(step: int) -> Batch:
    views = torch.randn(SAMPLES, 3, 3, 8, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return make_batch(views, clock=Clock(step, EPOCHS * STEPS, STEPS))


def method(learn: bool = False) -> MiCE:
    torch.manual_seed(0)
    return MiCE(
        ConvNet(2, "global"),
        experts=EXPERTS,
        queue=QueueOptions(length=KEYS, placement="sharded"),
        temperature=TAU,
        gate_temperature=KAPPA,
        momentum=MOMENTUM,
        dim=DIM,
        learn_centres=learn,
    ).double()


def trained(own: MiCE, first: int = 0, last: int = EPOCHS * STEPS) -> list[float]:
    """The losses of plain training steps over ranks."""
    optimizer, losses = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], LR), list[float]()
    for step in range(first, last):
        if step % STEPS == 0:
            with torch.no_grad():
                own.before_epoch(step // STEPS, NO_FEATURES)
        part = batch(step).chunks(collectives.world_size())[collectives.rank()]
        z, t = own.embed(part), own.target(part)
        loss = own.loss(z, t, part)
        optimizer.zero_grad()
        loss.backward()
        for p in own.parameters():
            p.grad = collectives.mean(p.grad) if p.grad is not None else None
        optimizer.step()
        own.update({name: x.detach() for name, x in z.items()}, t, part)
        losses.append(collectives.mean(loss.detach()).item())
    return losses


class Elbo:
    """The authors' class without its 1e-18 in logarithms: the posterior stands inside the graph."""

    def __init__(self, own: MiCE) -> None:
        self.own, self.mu, self.at = own, F.normalize(own.centres, dim=1), 0
        self.queue = own.queue.keys.clone().unflatten(1, (EXPERTS, DIM))

    def loss(self, f: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        log_pi = F.log_softmax(torch.einsum("kd,bd->bk", self.own.gates, g) / KAPPA, 1)
        positive = torch.einsum("bkd,bkd->kb", f, v) + torch.einsum("bkd,kd->kb", v, self.mu)
        negative = torch.einsum("vkd,bkd->kbv", self.queue.clone(), f)
        negative = negative + torch.einsum("vkd,kd->kv", self.queue, self.mu)[:, None]
        log_phi = F.log_softmax(torch.cat([positive[..., None], negative], 2) / TAU, 2)[:, :, 0].T
        joint = log_phi.exp() * log_pi.exp()
        posterior = joint / joint.sum(1, keepdim=True)
        return -(posterior * (log_pi + log_phi - posterior.log())).sum() / len(f), posterior.detach()

    def train(self) -> tuple[list[float], list[Tensor]]:
        own, losses, centres = self.own, list[float](), list[Tensor]()
        teacher = copy.deepcopy(own.online()).requires_grad_(False)
        optimizer = torch.optim.SGD([p for p in own.parameters() if p.requires_grad], LR)
        for epoch in range(EPOCHS):
            sums = torch.zeros(EXPERTS, DIM, dtype=torch.float64)
            for step in range(epoch * STEPS, (epoch + 1) * STEPS):
                x1, x2, x3 = batch(step).views[0].unbind(1)
                f = F.normalize(own.online()(x1).view(-1, EXPERTS, DIM), dim=2)
                v = F.normalize(teacher(x2).view(-1, EXPERTS, DIM), dim=2)
                loss, posterior = self.loss(f, v, F.normalize(own.gate_head(own.encoder(x3)), dim=1))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                for mine, theirs in zip(teacher.parameters(), own.online().parameters(), strict=True):
                    mine.mul_(MOMENTUM).add_(theirs.detach() * (1 - MOMENTUM))
                self.queue[(torch.arange(SAMPLES) + self.at) % KEYS] = v
                self.at = (self.at + SAMPLES) % KEYS
                sums += torch.einsum("bk,bkd->kd", F.one_hot(posterior.argmax(1), EXPERTS).double(), v)
                losses.append(loss.item())
            self.mu = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), self.mu)
            centres.append(self.mu)
        return losses, centres


def test_it_trains_as_the_authors() -> None:
    ours, theirs = method(), Elbo(method())
    losses = trained(ours)
    want, centres = theirs.train()
    assert losses == pytest.approx(want, rel=1e-10)
    assert_close(ours.centres, centres[-2], rtol=1e-9, atol=1e-10)  # the last epoch's come with the next one
    ours.before_epoch(EPOCHS, NO_FEATURES)
    assert_close(ours.centres, centres[-1], rtol=1e-9, atol=1e-10)
    assert (centres[0] - centres[-1]).norm() > 0.1 and not ours.sums.counts.any()
    for name, p in theirs.own.named_parameters():
        if p.requires_grad:
            assert_close(ours.get_parameter(name), p, rtol=1e-8, atol=1e-10)


def on_ranks() -> dict[str, Tensor]:
    found = dict[str, Tensor]()
    for learn in (False, True):
        own = method(learn)
        found[f"losses, {learn}"] = torch.tensor(trained(own), dtype=torch.float64)
        with torch.no_grad():
            own.before_epoch(EPOCHS, NO_FEATURES)
        found[f"mu, {learn}"] = own.mu().detach()
        found |= {f"{name}, {learn}": p.detach() for name, p in own.named_parameters()}
    return found


def test_ranks_change_nothing() -> None:
    whole = on_ranks()
    for name, x in run_ranks(3, on_ranks)[0].items():
        assert_close(x, whole[name], rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_learnt_centres_get_gradients_and_an_epochs_end_replaces_them() -> None:
    own, fixed = method(learn=True), method()
    assert own.learnt is not None and fixed.learnt is None
    assert [group.prefix for group in own.groups()] == ["learnt"] and not fixed.groups()
    assert trained(own, 0, 1) == trained(fixed, 0, 1)  # mu begins alike
    trained(own, 1, STEPS)
    assert (own.mu() - fixed.centres).norm() > 1e-4
    sums, counts = own.sums.total()
    with torch.no_grad():
        own.before_epoch(1, NO_FEATURES)
    assert counts.sum() == STEPS * SAMPLES
    assert_close(own.mu()[counts > 0].detach(), F.normalize(sums, dim=1)[counts > 0], rtol=1e-9, atol=1e-9)


def test_an_expert_without_images_keeps_its_centre() -> None:
    own = method()
    before = own.centres.clone()
    own.sums.add(torch.eye(DIM, dtype=torch.float64)[:2], torch.tensor([1, 1]))
    own.before_epoch(1, NO_FEATURES)
    assert torch.equal(own.centres[[0, 2, 3]], before[[0, 2, 3]])
    assert_close(own.centres[1], F.normalize(torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64), dim=0))


def test_experts_in_use() -> None:
    own = method()
    own.sums.counts.copy_(torch.tensor([6, 6, 0, 0]))
    assert own.scalars() == {"experts_used": pytest.approx(2), "largest_expert": pytest.approx(0.5)}


@pytest.mark.parametrize("count", [2, 3, 10])
def test_gates_are_as_far_apart_as_can_be(count: int) -> None:
    products = simplex(count, 9).double() @ simplex(count, 9).double().T
    want = torch.full((count, count), -1 / (count - 1)).fill_diagonal_(1).double()
    assert_close(products, want, rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="11 equally distant directions need 10 dimensions; method.dim is 9"):
        simplex(11, 9)


def test_a_small_temperature_needs_the_shift() -> None:
    """Similarities of 2 / 0.01 = 200 overflow without a maximum."""
    torch.manual_seed(1)
    queue = Queue(QueueOptions(length=KEYS), EXPERTS * DIM).double()
    q, v = torch.randn(2, 5, EXPERTS, DIM, dtype=torch.float64)
    q, v = 2 * F.normalize(q, dim=2), F.normalize(v, dim=2)
    queue.keys.copy_(F.normalize(queue.keys.unflatten(1, (EXPERTS, DIM)), dim=2).flatten(1))
    keys = queue.keys.unflatten(1, (EXPERTS, DIM))
    logits = torch.cat([(q * v).sum(2)[..., None], torch.einsum("nkd,mkd->nkm", q, keys)], 2) / 0.01
    want = F.log_softmax(logits, 2)[..., 0]
    assert_close(expert_log_likelihoods(q, v, queue, 0.01), want, rtol=1e-10, atol=1e-10)


def sums_of_ranks() -> ClusterSums:
    own = ClusterSums(2, 3)
    own.add(torch.full((1, 3), 0.25 * (collectives.rank() + 1)), torch.tensor([collectives.rank() % 2]))
    return own


def resharded(stored: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    own = ClusterSums(2, 3)
    own.add(torch.ones(1, 3), torch.tensor([0]))  # it holds something else before
    own.reshard(len(stored), lambda name, rank: stored[rank][name])
    return own.total()


def test_sums_are_the_same_on_other_ranks() -> None:
    stored = [dict(own.state_dict()) for own in run_ranks(3, sums_of_ranks)]
    for ranks in (1, 2):
        sums, counts = run_ranks(ranks, resharded, stored)[0]
        assert sums.tolist() == [[1.0] * 3, [0.5] * 3] and counts.tolist() == [2, 1]
