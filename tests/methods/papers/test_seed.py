"""SEED against its equations in plain code, its limits, several teachers, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kilobatch.data.batch import make_batch
from kilobatch.data.errors import UserError
from kilobatch.launch.worker.pretrained import EncoderAlone
from kilobatch.methods.losses.distillation import similarity_distillation
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.method import Method
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.teacher import FeatureTeacher
from kilobatch.methods.papers.seed import SEED

N, D, KEYS = 6, 8, 20


def rows(n: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1)


def queue() -> Queue:
    made = Queue(QueueOptions(length=KEYS), D).double()
    made.keys.copy_(rows(KEYS, 3))
    return made


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("tau", "tau_t"), [(0.2, 0.1), (0.2, 0.01), (0.02, 0.01)])
def test_loss_and_gradient_are_the_papers(tau: float, tau_t: float, own: bool) -> None:
    """Small temperatures take the way whose maxima are subtracted first."""
    z, t, memory = rows(N, 1).requires_grad_(), rows(N, 2), queue()
    loss = similarity_distillation(z, t, memory, tau, tau_t, own)
    keys = memory.keys.expand(N, -1, -1)
    keys = torch.cat([keys, t[:, None]], 1) if own else keys  # (n, K or K + 1, D)
    p_t = (torch.einsum("nkd,nd->nk", keys, t) / tau_t).softmax(1)
    want = F.cross_entropy(torch.einsum("nkd,nd->nk", keys, z) / tau, p_t)
    assert_close(loss, want)
    assert_close(*(torch.autograd.grad(x, z)[0] for x in (loss, want)))


def test_a_student_that_is_its_teacher_has_no_gradient() -> None:
    t, memory = rows(N, 2), queue()
    z = t.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(similarity_distillation(z, t, memory, 0.1, 0.1), z)
    along = (gradient * t).sum(1, keepdim=True) * t  # which the normalisation takes away
    other = torch.autograd.grad(similarity_distillation(z, rows(N, 5), memory, 0.1, 0.1), z)[0]
    assert (gradient - along).norm() < 0.2 * other.norm()


def test_an_empty_queue_leaves_the_own_key_alone() -> None:
    empty = Queue(QueueOptions(length=KEYS, start="empty"), D).double()
    z = rows(N, 1).requires_grad_()
    loss = similarity_distillation(z, rows(N, 2), empty, 0.2, 0.1)
    assert_close(loss.detach(), torch.zeros((), dtype=torch.float64))
    assert torch.isfinite(torch.autograd.grad(loss, z)[0]).all()


def teacher(seed: int, width: int = 1) -> Method:
    torch.manual_seed(seed)
    return EncoderAlone(ConvNet(width)).eval().requires_grad_(False)


def student(teachers: list[Method], **options: object) -> SEED:
    torch.manual_seed(0)
    names = [str(k) for k in range(len(teachers))]
    arguments = {"teacher": names[0], "further_teachers": tuple(names[1:]), "queue": QueueOptions(length=KEYS)}
    method = SEED(ConvNet(2), **{**arguments, **options})  # pyright: ignore[reportArgumentType]
    method.load_pretrained(lambda where: teachers[int(where)], fresh=True)
    return method


def test_similarities_of_several_teachers_are_their_mean() -> None:
    one, two = teacher(1), teacher(2, width=2)
    images = torch.randn(4, 3, 32, 32)
    whole = FeatureTeacher([one, two], "fp32", None)(images)
    parts = [F.normalize(method.represent(images), dim=1) for method in (one, two)]
    assert_close(whole @ whole.T, sum((x @ x.T for x in parts), torch.zeros(4, 4)) / 2)


def test_the_teacher_s_keys_enter_the_queue_and_its_weights_stay() -> None:
    method = student([teacher(1)], dim=8, teacher_size=16)
    batch = make_batch(torch.randn(5, 1, 3, 32, 32), torch.arange(5))
    z, t = method.embed(batch), method.target(batch)
    resized = F.interpolate(batch.views[0][:, 0], (16, 16), mode="bilinear", antialias=True)
    assert_close(t["t"], F.normalize(teacher(1).represent(resized), dim=1))
    method.loss(z, t, batch).backward()
    method.update(z, t, batch)
    assert method.queue is not None and contains(method.queue.keys, t["t"])
    assert all(p.grad is not None for p in method.parameters())
    assert not any("teach" in name for name in method.state_dict())


def contains(keys: Tensor, new: Tensor) -> bool:
    return all(bool((keys == row).all(1).any()) for row in new)


def test_features_are_regressed_without_a_queue() -> None:
    method = student([teacher(1)], dim=8, by="features")
    z, t = rows(N, 1), rows(N, 2)
    assert method.queue is None
    loss = method.loss({"z": z}, {"t": t}, make_batch(torch.zeros(N, 1), torch.arange(N)))
    assert_close(loss, (2 - 2 * F.cosine_similarity(z, t)).mean())


def test_another_width_is_refused() -> None:
    with pytest.raises(UserError, match=r"method.dim is 9, but the teacher has 8 features; use method.dim=8"):
        student([teacher(1)], dim=9)
