"""docs/guides/coming-from.md against lightly itself: its parameters, defaults, losses, heads, LARS and warm-up."""

import ast
import importlib
import inspect
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.views.options import Blur, Crop, Jitter, Views
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.methods import collectives
from kilobatch.methods.losses.contrastive import info_nce, nt_xent
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.heads import ProjectionHead, unit
from kilobatch.methods.papers.moco import MoCo
from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.optim.schedules import ScheduleOptions, lr_at
from tests.guides import coming_from_page as page
from tests.helpers.process_groups import run_ranks

pytest.importorskip("lightly.loss", reason="lightly is not installed: the page's rows of it are not compared")
MODULES = (
    "transforms.simclr_transform",
    "transforms.moco_transform",
    "transforms.dino_transform",
    "loss",
    "models.modules",
    "models.utils",
    "utils.lars",
    "utils.scheduler",
    "utils.benchmarking.knn",
)
CALLS = page.calls("lightly")


def of_lightly(name: str) -> Any:
    modules = (importlib.import_module(f"lightly.{module}") for module in MODULES)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


@pytest.mark.parametrize(("row", "name", "arguments"), CALLS, ids=[row.id for row, *_ in CALLS])
def test_a_row_names_a_parameter(row: page.PageRow, name: str, arguments: dict[str, str]) -> None:
    parameters = inspect.signature(of_lightly(name)).parameters
    assert arguments and arguments.keys() <= parameters.keys()
    for key, text in arguments.items():
        changed = key in (
            "memory_bank_size",
            "rr_prob",
            "rr_degrees",
            "m",
            "warmup_epochs",
            "max_epochs",
            "distributed",
        )
        if text != "..." and not changed:
            assert ast.literal_eval(text) == parameters[key].default, key


def test_all_parameters_of_its_views_are_on_the_page() -> None:
    shown = {key for _, name, arguments in CALLS if name == "SimCLRTransform" for key in arguments}
    assert shown == inspect.signature(of_lightly("SimCLRTransform")).parameters.keys()


def read_views(transform: Any) -> Views:
    """What a SimCLRViewTransform's own parts say."""
    crop, flip, vertical, rotation, jitter, grey, blur, _, normalize = transform.transform.transforms
    assert vertical.p == 0 and rotation.prob == 0 and crop.size[0] == crop.size[1]
    assert type(blur).__name__ == "GaussianBlur"  # Pillow's, whose border is its last pixel
    (colours,) = jitter.transforms
    strengths = {}
    for name in ("brightness", "contrast", "saturation"):
        low, high = getattr(colours, name)
        assert low == pytest.approx(max(0, 2 - high))
        strengths[name] = round(high - 1, 6)
    return Views(
        size=crop.size[0],
        crop=Crop(scale=crop.scale, ratio=crop.ratio),
        interpolation=getattr(crop.interpolation, "value", crop.interpolation),
        flip=flip.p,
        jitter=Jitter(probability=jitter.p, hue=colours.hue[1], **strengths),
        grey=grey.p,
        blur=Blur(probability=blur.prob, sigma=blur.sigmas, border="edge"),
        mean=tuple(normalize.mean),
        std=tuple(normalize.std),
    )


def test_its_views_are_ours() -> None:
    one, two = of_lightly("SimCLRTransform")().transforms
    assert read_views(one) == read_views(two) == Views(blur=Blur(border="edge"))
    one, two = of_lightly("MoCoV2Transform")().transforms
    assert read_views(one) == read_views(two) == resolve_recipe("moco_v2_imagenet", []).data.views


def test_its_strength_is_a_factor() -> None:
    half = read_views(of_lightly("SimCLRTransform")(cj_strength=0.5).transforms[0])
    assert half.jitter == Jitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)


def embeddings(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z1 = torch.randn(12, 8, dtype=torch.float64, generator=generator)
    return z1, z1 + torch.randn(12, 8, dtype=torch.float64, generator=generator)


def with_gradients(loss: Any, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean over ranks of the loss, and its gradient with respect to this rank's rows."""
    mine = [z.chunk(collectives.world_size())[collectives.rank()].clone().requires_grad_() for z in (z1, z2)]
    value = loss(*mine)
    one, two = torch.autograd.grad(value, mine)
    return collectives.mean(value.detach()), one / collectives.world_size(), two / collectives.world_size()


def theirs_on_a_rank(gather: bool, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return with_gradients(of_lightly("NTXentLoss")(temperature=0.5, gather_distributed=gather), z1, z2)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_its_loss_is_ours(temperature: float) -> None:
    theirs = with_gradients(of_lightly("NTXentLoss")(temperature=temperature), *embeddings())
    ours = with_gradients(lambda z1, z2: nt_xent(z1, z2, temperature), *embeddings())
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_on_several_ranks_it_is_ours_if_it_gathers() -> None:
    loss, one, two = with_gradients(lambda z1, z2: nt_xent(z1, z2, 0.5), *embeddings())
    gathered = run_ranks(2, theirs_on_a_rank, True, *embeddings())
    assert_close(gathered[0][0], loss, rtol=1e-12, atol=0)
    assert_close(torch.cat([rank[1] for rank in gathered]), one, rtol=1e-10, atol=1e-12)
    assert_close(torch.cat([rank[2] for rank in gathered]), two, rtol=1e-10, atol=1e-12)
    alone = run_ranks(2, theirs_on_a_rank, False, *embeddings())
    assert alone[0][0] < 0.9 * loss  # with fewer negatives


def banks(length: int) -> tuple[Any, Queue]:
    """Their loss with a memory bank, and our queue with the same keys; both write at the first row next."""
    theirs, queue = (
        of_lightly("NTXentLoss")(temperature=0.2, memory_bank_size=(length, 8)),
        Queue(QueueOptions(length=length), 8),
    )
    queue.keys.copy_(theirs.memory_bank.bank)
    return theirs, queue


def test_its_memory_bank_is_our_queue() -> None:
    theirs, queue = banks(36)
    for step in range(5):
        z1, z2 = (z.float() for z in embeddings(step))
        value = theirs(z1.requires_grad_(), z2)
        ours = info_nce(unit(z1), unit(z2), queue, 0.2)
        assert_close(ours, value, rtol=1e-5, atol=1e-6)
        (want,), (got,) = torch.autograd.grad(value, z1), torch.autograd.grad(ours, z1)
        assert_close(got, want, rtol=1e-4, atol=1e-6)
        queue.push(unit(z2))
    assert not theirs.state_dict() and "keys" in queue.state_dict()  # only ours is in a checkpoint


def test_past_its_end_its_memory_bank_drops_keys() -> None:
    theirs, queue = banks(30)
    steps = [[z.float() for z in embeddings(step)] for step in range(3)]
    for z1, z2 in steps:
        theirs(z1.requires_grad_(), z2)
        queue.push(unit(z2))
    last = unit(steps[-1][1])
    kept = [bool((rows @ last[-1] > 1 - 1e-5).any()) for rows in (theirs.memory_bank.bank, queue.keys)]
    assert kept == [False, True]
    assert_close(queue.keys[:6], last[6:])


def shapes(network: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for p in network.parameters()]


def test_its_heads_have_our_shapes() -> None:
    for layers in (2, 3):
        theirs = of_lightly("SimCLRProjectionHead")(64, 48, 16, num_layers=layers)
        assert shapes(theirs)[:-1] == shapes(ProjectionHead(64, 48, 16, "local", layers))  # the last is a norm's bias
        assert shapes(theirs)[-1] == (16,)
    encoder = ConvNet(4, "local")
    moco = MoCo(encoder, queue=QueueOptions(length=64), dim=16)
    assert shapes(of_lightly("MoCoProjectionHead")(encoder.features, encoder.features, 16)) == shapes(moco.head)


def test_its_lars_is_the_dialect_bolts() -> None:
    torch.manual_seed(0)
    one = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    two = nn.Parameter(one.detach().clone())
    options: dict[str, Any] = {"lr": 0.3, "momentum": 0.9, "weight_decay": 1e-2, "trust_coefficient": 0.01}
    optimizers = of_lightly("LARS")([one], **options), LARS([two], **options, dialect="bolts")
    for _ in range(4):
        one.grad = torch.randn_like(one)
        two.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    assert_close(two, one, rtol=1e-9, atol=0)


def test_its_rate_is_up_to_a_step_ahead() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = of_lightly("CosineWarmupScheduler")(optimizer, warmup_epochs=10, max_epochs=100)
    options = ScheduleOptions(epochs=100, warmup_epochs=10, final=0.001)
    ours = [lr_at(options, 1.0, step, 1) for step in range(101)]
    want = [theirs.scale_lr(step) for step in range(100)]
    np.testing.assert_allclose(want[:9], ours[1:10])
    assert all(ours[t + 1] - 1e-12 <= want[t] <= ours[t] + 1e-12 for t in range(10, 100))
