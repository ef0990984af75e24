"""DINO: against the authors' loss and lightly's, its centre over ranks, its schedules, and what tells of a collapse."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.batch import Batch, Clock, make_batch
from kilobatch.methods import collectives
from kilobatch.methods.losses import prototype_distillation as blocks
from kilobatch.methods.losses.prototype_distillation import prototype_distillation
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.heads import Directions
from kilobatch.methods.papers.dino import DINO, temperature_at
from tests.helpers.process_groups import run_ranks

SAMPLES, VIEWS, DIM, PROTOTYPES = 12, 5, 6, 9
TAU, TEACHER_TAU = 0.1, 0.05


def dino(unit_prototypes: bool = True, head_norm: bool = False) -> DINO:
    torch.manual_seed(0)
    method = DINO(
        ConvNet(2),
        prototypes=PROTOTYPES,
        dim=DIM,
        hidden=10,
        teacher_temperature=TEACHER_TAU,
        unit_prototypes=unit_prototypes,
        head_norm=head_norm,
    )
    with torch.no_grad():
        method.center.copy_(torch.randn(PROTOTYPES) / 5)
        for p in method.head.parameters():
            p.add_(torch.randn_like(p) / 5)
    return method


def batch(samples: int = SAMPLES, clock: Clock | None = None) -> Batch:
    draws = torch.Generator().manual_seed(1)
    large, small = (torch.randn(samples, v, 3, size, size, generator=draws) for v, size in ((2, 12), (3, 8)))
    return make_batch((large, small), clock=clock or Clock(1, 4, 2))


def rows(views: int, seed: int) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(SAMPLES, views, DIM, generator=draws, dtype=torch.float64), dim=-1)


def vectors(seed: int) -> Tensor:
    return torch.randn(PROTOTYPES, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """z and the student's prototypes, which take gradient; the teacher's rows, prototypes and centre."""
    center = torch.randn(PROTOTYPES, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / 5
    return rows(VIEWS, 1).requires_grad_(), vectors(2).requires_grad_(), (rows(2, 3), vectors(4), center)


def authors(z: Tensor, prototypes: Tensor, teacher: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Algorithm 1 for each pair, by torch's softmax over all prototypes."""
    t, of_teacher, center = teacher
    q, terms = torch.softmax((t @ of_teacher.T - center) / TEACHER_TAU, -1), []
    for i in range(2):
        for v in range(z.shape[1]):
            if v != i:
                terms.append(-(q[:, i] * torch.log_softmax(z[:, v] @ prototypes.T / TAU, -1)).sum(-1).mean())
    return sum(terms, torch.zeros(())) / len(terms)


def compare(ours: Tensor, want: Tensor, z: Tensor, prototypes: Tensor, limit: float) -> None:
    assert_close(ours, want, rtol=limit, atol=limit)
    found, expected = (torch.autograd.grad(2 * loss, (z, prototypes)) for loss in (ours, want))
    assert_close(found, expected, rtol=limit, atol=limit)


@pytest.mark.parametrize("block", [1, 3, SAMPLES])
def test_blocks_have_the_value_and_gradients_of_all_scores_at_once(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(blocks, "CPU_SCORES", block * VIEWS * PROTOTYPES)
    z, prototypes, teacher = inputs()
    ours = prototype_distillation(z, prototypes, teacher, TAU, TEACHER_TAU)
    compare(ours, authors(z, prototypes, teacher), z, prototypes, 1e-12)


@pytest.mark.parametrize("views", [2, VIEWS])
def test_value_gradients_and_centre_are_lightlys(views: int) -> None:
    theirs = pytest.importorskip("lightly.loss").DINOLoss(PROTOTYPES, teacher_temp=TEACHER_TAU, student_temp=TAU)
    z, prototypes, teacher = inputs()
    z, (t, of_teacher, center) = z.detach()[:, :views].requires_grad_(), teacher
    theirs.center = center.clone()[None, None]
    g_t = t @ of_teacher.T
    want = theirs([*g_t.unbind(1)], [*(z @ prototypes.T).unbind(1)])
    compare(prototype_distillation(z, prototypes, teacher, TAU, TEACHER_TAU), want, z, prototypes, 1e-6)

    method, of = dino().double(), batch()
    method.teacher.get_parameter("network.1.prototypes.weight").copy_(of_teacher)
    method.center.copy_(center)
    before = method.teacher_prototypes
    expected = 0.9 * center + 0.1 * (t @ before.T).mean((0, 1))
    method.update({"z": z.detach()}, {"z": t}, of)
    assert_close(method.center, expected, rtol=1e-12, atol=1e-12)
    theirs.center = center.clone()[None, None]
    theirs.update_center((t @ before.T).transpose(0, 1))
    assert_close(method.center, theirs.center.flatten(), rtol=1e-6, atol=1e-6)


def on_ranks() -> tuple[Tensor, Tensor]:
    world, rank = collectives.world_size(), collectives.rank()
    method = dino().double()
    part = batch().to(torch.float64).chunks(world)[rank]
    method.eval()  # fixed norms
    method.update(method.embed(part), method.target(part), part)
    return method.center, method.teacher.get_parameter("network.1.layers.0.weight").clone()


def test_the_centre_is_that_of_all_ranks() -> None:
    center, teacher = on_ranks()
    assert (center - dino().center).abs().max() > 0.01
    for found in run_ranks(3, on_ranks):
        assert_close(found, (center, teacher), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("head_norm", [False, True])
def test_gradients_reach_all_that_is_trained(head_norm: bool) -> None:
    method, of = dino(unit_prototypes=False, head_norm=head_norm), batch()
    z, t = method.embed(of), method.target(of)
    assert t["z"].shape == (SAMPLES, 2, DIM) and z["z"].shape == (SAMPLES, VIEWS, DIM)
    method.loss(z, t, of).backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == {name for name, p in method.named_parameters() if p.requires_grad}
    assert not any(name.startswith("teacher.") for name in reached) and not t["z"].requires_grad


def test_prototypes_are_those_of_torchs_weight_norm() -> None:
    ours = Directions(DIM, PROTOTYPES, scaled=True).double()
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(DIM, PROTOTYPES, bias=False).double())
    g, v = (theirs.get_parameter(f"parametrizations.weight.original{i}") for i in (0, 1))
    with torch.no_grad():
        v.copy_(ours.weight)
        g.fill_(1)
    x = rows(1, 1)[:, 0]
    got = torch.autograd.grad((x @ ours().T).square().sum(), [*ours.parameters()])
    want = torch.autograd.grad(theirs(x).square().sum(), (v, g))
    assert_close(got, want, rtol=1e-9, atol=1e-9)
    assert Directions(DIM, PROTOTYPES).length is None


def test_the_teacher_follows_with_statistics_of_its_own_and_is_what_is_kept() -> None:
    method, of = dino(), batch(clock=Clock(1, 4, 2))
    assert method.kept_encoder is method.teacher.network.get_submodule("0")
    before = method.teacher.get_parameter("network.1.layers.0.weight").clone()
    mean = next(m for m in batch_norm.norms(method.kept_encoder)).running_mean.clone()
    z, t = method.embed(of), method.target(of)
    batch_norm.commit(method)
    method.update(z, t, of)
    share = (1 - 0.996) * (1 + math.cos(math.pi / 4)) / 2  # of the step that begins at a quarter of the training
    after = method.teacher.get_parameter("network.1.layers.0.weight")
    assert_close(after, before + share * (method.head.get_parameter("layers.0.weight") - before), rtol=0, atol=1e-7)
    own = next(m for m in batch_norm.norms(method.kept_encoder)).running_mean
    online = next(m for m in batch_norm.norms(method.encoder)).running_mean
    assert (own - mean).abs().max() > 1e-4 and (own - online).abs().max() > 1e-4  # the student saw small views as well
    assert_close(method.eval().represent(of.views[0][:, 0]), method.kept_encoder(of.views[0][:, 0]))


@pytest.mark.parametrize("epochs", [0, 1, 2, 30])
def test_the_teachers_temperature_rises_as_the_authors(epochs: int) -> None:
    theirs = [*torch.linspace(0.04, 0.07, epochs, dtype=torch.float64).tolist(), *[0.07] * 5]
    found = [temperature_at(Clock(7 * epoch + 6, 700, 7), 0.04, 0.07, epochs) for epoch in range(len(theirs))]
    assert found == pytest.approx(theirs, abs=1e-9)


def test_prototypes_are_frozen_at_first() -> None:
    (group,) = dino(unit_prototypes=False).groups()
    frozen = {name for name, p in dino(unit_prototypes=False).named_parameters() if group.holds(name)}
    assert frozen == {"head.prototypes.weight", "head.prototypes.length"} and group.from_epoch == 1


def test_scalars_tell_either_collapse() -> None:
    method, of = dino(), batch()
    assert method.scalars() == {}
    z, t = method.embed(of), method.target(of)
    method.update(z, t, of)
    healthy = method.scalars()
    assert healthy["information"] > 0.02 and 0 < healthy["entropy"] < math.log(PROTOTYPES)
    same = method.teacher_prototypes[0].expand(SAMPLES, 2, DIM)  # every image in one point, and nothing takes it out
    method.last = z["z"], same, 0.01
    method.center.zero_()
    single = method.scalars()
    assert single["entropy"] < 0.3 and abs(single["information"]) < 1e-5
    method.center.copy_(method.teacher_prototypes @ same[0, 0])  # the centre has caught up with it
    even = method.scalars()
    assert even["entropy"] == pytest.approx(math.log(PROTOTYPES), abs=1e-3) and abs(even["information"]) < 1e-5
