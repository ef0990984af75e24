"""Distillation against the paper's equations in NumPy, its limits, and its teacher through real steps."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from kilobatch.data.batch import Batch, make_batch
from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.distill import Distill
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.methods.papers.simclr_v2 import SimCLRV2
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim.optimizers import build_optimizer
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.optim.parameter_groups import parameter_groups
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.step import forward_backward
from tests.helpers.process_groups import run_ranks

CLASSES, SAMPLES = 5, 12
LABELS = torch.tensor([0, 4, -1, 2, -1, -1, 1, 3, 3, -1, 0, -1])


def teacher(classes: int = CLASSES) -> FineTune:
    """A teacher whose logits differ, with random running statistics."""
    torch.manual_seed(7)
    method = FineTune(ConvNet(3, "local"), layer=1, hidden=9)
    method.prepare(DataFacts(100, classes))
    torch.nn.init.normal_(method.classifier.weight)
    for module in batch_norm.norms(method):
        torch.nn.init.normal_(module.running_mean, std=0.1)
        torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return method.eval().requires_grad_(False)


def student(source: Any = None, **options: Any) -> Distill:
    torch.manual_seed(0)
    method = Distill(ConvNet(2, "local"), teacher="runs/teacher", **options)
    method.prepare(DataFacts(100, CLASSES))
    method.load_pretrained(lambda where: {"runs/teacher": source or teacher()}[where], fresh=True)
    return method


def logits(seed: int) -> Tensor:
    return 3 * torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_and_gradient(z: Tensor, t: Tensor, label: Tensor, temperature: float, alpha: float) -> tuple[Tensor, Tensor]:
    method = Distill(ConvNet(2), teacher="", temperature=temperature, alpha=alpha)
    z = z.clone().requires_grad_()
    loss = method.loss({"logits": z}, {"logits": t}, make_batch(torch.zeros(len(z), 1), torch.arange(len(z)), label))
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def paper(z: Tensor, t: Tensor, label: Tensor, temperature: float, alpha: float) -> tuple[float, np.ndarray]:
    """Eq. 4 over the number of images, image by image, and its gradient by the student's logits, by hand; the teacher's
    part times the square of the temperature, as in the authors' notebook."""
    s, y = z.numpy(), label.numpy()
    p_t, p_s, p_1 = softmax(t.numpy() / temperature), softmax(s / temperature), softmax(s)
    loss, gradient = 0.0, np.zeros_like(s)
    for i in range(len(s)):
        loss -= alpha * temperature**2 * sum(p_t[i, c] * np.log(p_s[i, c]) for c in range(CLASSES))
        gradient[i] += alpha * temperature * (p_s[i] - p_t[i])
        if y[i] >= 0:
            loss -= (1 - alpha) * np.log(p_1[i, y[i]])
            gradient[i] += (1 - alpha) * (p_1[i] - np.eye(CLASSES)[y[i]])
    return loss / len(s), gradient / len(s)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_the_papers(temperature: float, alpha: float) -> None:
    arguments = logits(1), logits(2), LABELS, temperature, alpha
    loss, gradient = loss_and_gradient(*arguments)
    want, want_gradient = paper(*arguments)
    assert abs(loss - want) <= 1e-12 * want
    assert np.linalg.norm(gradient.numpy() - want_gradient) <= 1e-12 * np.linalg.norm(want_gradient)


def test_alpha_0_is_labels_alone_and_alpha_1_the_teacher_alone() -> None:
    labelled = LABELS >= 0
    loss, gradient = loss_and_gradient(logits(1), logits(2), LABELS, 0.7, 0.0)
    assert_close(loss, F.cross_entropy(logits(1)[labelled], LABELS[labelled]) * labelled.sum() / SAMPLES)
    assert not gradient[~labelled].any()
    assert all(map(torch.equal, loss_and_gradient(logits(1), logits(3), LABELS, 0.7, 0.0), (loss, gradient)))
    with_labels, without = (
        loss_and_gradient(logits(1), logits(2), y, 0.7, 1.0) for y in (LABELS, torch.full_like(LABELS, -1))
    )
    assert all(map(torch.equal, with_labels, without))
    _, at_the_teacher = loss_and_gradient(logits(2), logits(2), LABELS, 0.7, 1.0)
    assert at_the_teacher.norm() < 1e-15


def test_a_high_temperature_matches_logits_and_a_low_one_the_teachers_choice() -> None:
    """Hinton et al. 2015, arxiv.org/abs/1503.02531, eq. 4: with the factor t^2 the gradient nears the centred
    logits' difference over the number of classes, and its distance falls with 1/t."""
    z, t = logits(1), logits(2)
    limit = ((z - z.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))) / CLASSES / SAMPLES
    far = [(loss_and_gradient(z, t, LABELS, x, 1.0)[1] - limit).norm() / limit.norm() for x in (1e2, 1e3, 1e4)]
    assert far[0] < 0.1 and far[1] < 0.11 * far[0] and far[2] < 0.11 * far[1]
    loss, gradient = loss_and_gradient(z, t, LABELS, 1e-3, 1.0)
    z_of_argmax = z.clone().requires_grad_()
    want = 1e-6 * F.cross_entropy(z_of_argmax / 1e-3, t.argmax(1))
    assert_close(loss, want.detach(), rtol=1e-12, atol=0)
    assert_close(gradient, torch.autograd.grad(want, z_of_argmax)[0], rtol=1e-12, atol=1e-12)


def test_lars_adapts_the_students_classifier_and_not_that_of_fine_tuning() -> None:
    for method, adapted in ((student(), True), (teacher(), False)):
        groups = parameter_groups(method.requires_grad_(), OptimizerOptions(weight_decay=1e-4))
        assert [group["adapt"] for group in groups if "classifier.weight" in group["names"]] == [adapted]


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(SAMPLES, 1, 3, 12, 12, generator=generator)
    return make_batch(views, torch.arange(SAMPLES), LABELS).chunks(collectives.world_size())[collectives.rank()]


def train(optimizer: str, chunks: int, **options: Any) -> dict[str, Any]:
    """Results of three steps in DeepSpeed: the teacher before and after, and what includes it."""
    method, device = student(alpha=0.5, **options), torch.device("cpu")
    assert method.teaching
    method.to(device)
    named = build_optimizer(OptimizerOptions.model_validate({"name": optimizer, "lr": 0.2}), method, SAMPLES)
    engine_options = EngineOptions.model_validate({"chunks": chunks})
    engine = Engine(method, named, engine_options, device, SAMPLES // collectives.world_size())
    before = {name: x.clone() for name, x in method.teaching[0].method.state_dict().items()}
    began = {name: p.detach().clone() for name, p in method.named_parameters()}
    answers: list[Tensor] = []
    for step in range(3):
        method.train()
        answers.append(forward_backward(engine, batch(step)).t["logits"])
        engine.step(0.2)
        batch_norm.commit(method)
    after = method.teaching[0].method.state_dict()
    return {
        "teacher unchanged": before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before),
        "student moved": all(not torch.equal(p.detach(), began[n]) for n, p in method.named_parameters()),
        "answers": answers[-1],
        "types": {name: x.dtype for name, x in after.items() if x.is_floating_point()},
        "optimized": [name for group in named.param_groups for name in group["names"]],
        "kept": sorted(name.split(".")[1] for name in engine.pieces()),
        "training": method.training and not any(m.training for m in method.teaching[0].method.modules()),
        "asks": any(p.requires_grad or p.grad is not None for p in method.teaching[0].method.parameters()),
    }


def runs() -> list[dict[str, Any]]:
    return [train("lars", 1), train("sgd", 2, teacher_precision="bf16")]


def test_real_steps_leave_the_teacher_as_it_was() -> None:
    results = run_ranks(2, runs, timeout=180)
    names = [name for name, _ in student().named_parameters()]
    for rank in results:
        for run in rank:
            assert run["teacher unchanged"] and run["student moved"] and run["training"] and not run["asks"]
            assert sorted(run["optimized"]) == sorted(names)
            assert set(run["kept"]) <= {"encoder", "classifier", "momentum_buffer"}, run["kept"]
    whole, halved = (torch.cat([rank[k]["answers"] for rank in results]) for k in range(2))
    images = torch.cat([batch_of(2, rank) for rank in range(2)])
    assert_close(whole, teacher().logits(images))
    assert whole.dtype == halved.dtype == torch.float32
    assert 0 < (halved - whole).abs().max() < 0.05 * whole.abs().max()
    assert (halved.bfloat16().float() != halved).any()  # not rounded at the end
    types = results[0][1]["types"]
    kernels = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    assert kernels == {*(f"encoder.convs.{i}.weight" for i in range(6)), "hidden_layers.0.weight"}
    assert set(results[0][0]["types"].values()) == {torch.float32}


def batch_of(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, 1, 3, 12, 12, generator=generator).chunk(2)[rank][:, 0]


def test_the_teacher_is_no_submodule_and_moves_with_the_student() -> None:
    method = student()
    assert {name.split(".")[0] for name in method.state_dict()} == {"encoder", "classifier"}
    assert not any("teach" in name for name, _ in method.named_modules())
    assert method.teaching and next(method.teaching[0].method.parameters()).dtype == torch.float32
    method.double()
    assert next(method.teaching[0].method.parameters()).dtype == torch.float64
    assert method.views == 1 and method.classifies
    assert method.represent(torch.zeros(2, 3, 8, 8).double()).shape == (2, 16)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits_are_fp32_in_any_autocast(precision: str) -> None:
    method, of = student(teacher_precision=precision), batch(0)
    exact = teacher().logits(of.views[0][:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        z, t = method.embed(of)["logits"], method.target(of)["logits"]
    assert z.dtype == t.dtype == torch.float32 and not t.requires_grad
    assert 0 < (t - exact).norm() < 0.02 * exact.norm()


def test_a_start_gives_the_student_its_encoder_once() -> None:
    torch.manual_seed(3)
    beginning = SimCLRV2(ConvNet(2, "local"))
    labelled = {"runs/teacher": teacher(), "runs/start": beginning}
    for fresh in (True, False):
        method = Distill(ConvNet(2, "local"), teacher="runs/teacher", start="runs/start")
        method.prepare(DataFacts(100, CLASSES))
        method.load_pretrained(lambda where: labelled[where], fresh)
        weights = method.encoder.state_dict()["convs.0.weight"]
        assert torch.equal(weights, beginning.encoder.state_dict()["convs.0.weight"]) == fresh
        assert method.teaching


def test_methods_that_cannot_teach_are_refused() -> None:
    with pytest.raises(UserError, match="'runs/teacher' is of SimCLRV2, which has no classifier; fine-tune it"):
        student(SimCLRV2(ConvNet(2)))
    with pytest.raises(UserError, match="knows 3 classes, and data.train has 5"):
        student(teacher(classes=3))
