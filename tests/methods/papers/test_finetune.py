"""Fine-tuning compared with plain torch, and the weights that it starts from."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from kilobatch.data.batch import Batch, make_batch
from kilobatch.data.errors import UserError
from kilobatch.methods.method import DataFacts, Method, Tensors
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.methods.papers.simclr_v2 import SimCLRV2
from kilobatch.trainer.optim import optimizers
from kilobatch.trainer.optim.options import OptimizerOptions

SAMPLES, CLASSES, STEPS, LR = 10, 4, 4, 0.3
WIDTH = 24  # features of ConvNet(3)
KEPT = [(0, None), (1, None), (2, None), (3, 6)]  # layers of a head of 3, and the width of the last


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(SAMPLES, 1, 3, 12, 12, generator=generator, dtype=torch.float64)
    return make_batch(views, torch.arange(SAMPLES), torch.randint(CLASSES, (SAMPLES,), generator=generator))


def pretrained(hidden: int = 7, seed: int = 5) -> SimCLRV2:
    """A pre-trained method with random weights and running statistics."""
    torch.manual_seed(seed)
    method = SimCLRV2(ConvNet(3), hidden=hidden, dim=6)
    with torch.no_grad():
        for name, tensor in method.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                nn.init.uniform_(tensor, 0.5, 1.5) if "running" in name or "weight" in name else nn.init.normal_(tensor)
    return method.eval().requires_grad_(False)


def finetune(source: Method | None, fresh: bool = True, encoder: Encoder | None = None, **options: Any) -> FineTune:
    torch.manual_seed(0)
    method = FineTune(encoder or ConvNet(3), start=None if source is None else "runs/before", **options)
    method.prepare(DataFacts(100, CLASSES))
    method.load_pretrained(lambda where: {"runs/before": source}[where] or method, fresh)
    return method


class Plain(nn.Module):
    """The same network of torch's own layers."""

    def __init__(self, method: FineTune) -> None:
        super().__init__()
        sides = (3, 3, 6, 6, 12, 12, 24)
        layers: list[nn.Module] = []
        for i in range(6):
            conv = nn.Conv2d(sides[i], sides[i + 1], 3, stride=1 + i % 2, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(sides[i + 1]), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        for i in range(method.layer - (method.dim is not None)):
            layers += [nn.Linear(7 if i else WIDTH, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU()]
        if method.dim:  # tf2/model.py, ProjectionHead: use_bias=False (so BN without beta), and no tf.nn.relu
            layers += [nn.Linear(7, method.dim, bias=False), nn.BatchNorm1d(method.dim)]
            layers[-1].bias.requires_grad_(False)
        self.layers = nn.Sequential(*layers, nn.Linear(method.dim or (7 if method.layer else WIDTH), CLASSES))
        self.double()
        convs_and_norms = [x for pair in zip(range(6), range(6), strict=True) for x in pair]
        theirs = method.state_dict()
        names = [f"encoder.{('convs', 'norms')[k % 2]}.{i}." for k, i in enumerate(convs_and_norms)]
        names += [f"hidden_layers.{i}." for i in range(3 * method.layer) if i % 3 != 2] + ["classifier."]
        with_state = [layer for layer in self.layers if layer.state_dict()]
        for name, layer in zip(names, with_state, strict=True):
            own = layer.state_dict()
            layer.load_state_dict({key: theirs.get(name + key, torch.zeros_like(x)) for key, x in own.items()})


@pytest.mark.parametrize(("layer", "dim"), KEPT)
def test_it_trains_as_plain_torch(layer: int, dim: int | None) -> None:
    method = finetune(pretrained(), layer=layer, hidden=7, dim=dim).double()
    plain = Plain(method)
    ours, theirs = torch.optim.SGD(method.parameters(), LR, 0.9), torch.optim.SGD(plain.parameters(), LR, 0.9)
    for step in range(STEPS):
        data = batch(step)
        loss = method.loss(method.embed(data), {}, data)
        want = F.cross_entropy(plain.layers(data.views[0][:, 0]), data.label)
        for optimizer, value in ((ours, loss), (theirs, want)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        batch_norm.commit(method)
        assert_close(loss, want, rtol=1e-11, atol=0)
    images = batch(STEPS).views[0][:, 0]
    assert_close(method.eval().logits(images), plain.eval().layers(images), rtol=1e-9, atol=1e-12)
    assert_close(method.represent(images), plain.layers[:-1](images), rtol=1e-9, atol=1e-12)


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("layer", "dim"), KEPT)
def test_it_starts_from_encoder_and_first_layers_with_statistics(layer: int, dim: int | None) -> None:
    source = pretrained()
    method = finetune(source, layer=layer, hidden=7, dim=dim)
    assert same(method.encoder.state_dict(), source.encoder.state_dict())
    assert same(method.hidden_layers.state_dict(), source.head.layers[: 3 * layer].state_dict())
    assert all(p.requires_grad for p in method.parameters())
    images = batch(0).views[0][:, 0].float()
    with torch.no_grad():
        assert_close(method.eval().represent(images), source.head.layers[: 3 * layer](source.encoder(images)))
        assert not method.logits(images).any()  # of a classifier that begins with zeros
    for fewer in {max(0, layer - 1), layer}:  # from what was itself fine-tuned
        again = finetune(method, layer=fewer, hidden=7, dim=dim if fewer == layer else None)
        assert same(again.encoder.state_dict(), source.encoder.state_dict())
        assert same(again.hidden_layers.state_dict(), source.head.layers[: 3 * fewer].state_dict())
    with torch.no_grad():
        next(source.encoder.parameters()).zero_()
    assert not same(method.encoder.state_dict(), source.encoder.state_dict())  # a copy


def test_a_resumed_run_and_one_from_scratch_load_nothing() -> None:
    torch.manual_seed(0)
    untouched = ConvNet(3).state_dict()
    assert same(finetune(pretrained(), fresh=False, hidden=7).encoder.state_dict(), untouched)
    scratch = finetune(None)
    assert same(scratch.encoder.state_dict(), untouched)
    assert 0.005 < scratch.classifier.weight.std() < 0.015 and not scratch.classifier.bias.any()


class EncoderAlone(Method):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = ConvNet(3)


class Nothing(Encoder):
    features, norm = WIDTH, "global"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (pretrained(), {"layer": 4, "hidden": 7}, r"is 4, but .*'runs/before' has 3 layers .*r=3 method.dim=6$"),
        (pretrained(), {"layer": 3, "hidden": 7}, r"layer 3 is the last of .*method.dim=6 to keep it, or .*layer=2$"),
        (pretrained(), {"layer": 3, "hidden": 7, "dim": 5}, r"dim is 5, but .* projections of 6; use method.dim=6$"),
        (pretrained(), {"layer": 2, "hidden": 7, "dim": 6}, r"layer 2 of .* is a hidden one; .*dim out, or .*layer=3"),
        (SimCLR(ConvNet(3)), {"layer": 3}, r"layer is 3, but .* has 2 layers .*method.layer=2 method.dim=128$"),
        (EncoderAlone(), {}, r"layer is 1, but .* has 0 layers .*method.layer=0$"),
        (pretrained(), {}, r"another width: its 0.weight is \(7, 24\), here \(24, 24\); use method.hidden=7"),
        (pretrained(), {"encoder": ConvNet(4)}, r"another encoder: its convs.0.weight is \(3, 3, 3, 3\), here \(4, 3"),
        (pretrained(), {"encoder": Nothing()}, r"another encoder: its convs.0.weight is .*, here absent"),
    ],
)
def test_a_start_that_does_not_match_is_refused(source: Method, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.compile(message)):
        finetune(source, **options)


def test_an_encoder_alone_is_enough_without_layers() -> None:
    source = EncoderAlone()
    assert same(finetune(source, layer=0).encoder.state_dict(), source.encoder.state_dict())


def test_unlabelled_images_and_a_single_class_are_refused() -> None:
    method, data = finetune(None).double(), batch(0)
    data.label[[1, 4]] = -1
    with pytest.raises(UserError, match=r"2 of 10 images .*data.unlabelled=drop"):
        method.loss(method.embed(data), {}, data)
    with pytest.raises(UserError, match="1 classes"):
        FineTune(ConvNet(3)).prepare(DataFacts(100, 1))


@pytest.mark.parametrize("name", ["lars", "sgd"])
def test_lars_leaves_the_classifiers_steps_alone(name: str) -> None:
    """google-research/simclr, model_util.py, get_optimizer: head_supervised is in neither adaptation nor decay, and
    add_weight_decay gives it its decay back."""
    method = finetune(None)
    options = OptimizerOptions.model_validate({"name": name, "lr": 0.5, "weight_decay": 0.1, "momentum": 0})
    optimizer = optimizers.build_optimizer(options, method, 256)
    by_name = {n: group for group in optimizer.param_groups for n in group["names"]}
    assert {n for n, group in by_name.items() if not group["adapt"] and group["weight_decay"]} == {"classifier.weight"}
    assert by_name.keys() == dict(method.named_parameters()).keys()
    for p in method.parameters():
        p.grad = torch.ones_like(p)
    before = method.classifier.weight.detach().clone()
    optimizer.step()
    assert_close(method.classifier.weight.detach(), before - 0.5 * (1 + 0.1 * before))
