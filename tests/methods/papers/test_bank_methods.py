"""Instance discrimination and PIRL as their authors wrote them, line by line in fp64 and one process, through several
steps of training: zhirongw/lemniscate.pytorch (lib/NCEAverage.py, NCECriterion.py, LinearAverage.py) and
facebookresearch/vissl (nce_loss_with_memory, the head of pirl_jigsaw_4node_resnet50).
"""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.data.augment.jigsaw import patches
from kilobatch.data.batch import Batch, Clock, make_batch
from kilobatch.data.counter_rng import key, uniform
from kilobatch.methods.method import DataFacts
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.instance_discrimination import InstanceDiscrimination
from kilobatch.methods.papers.pirl import PIRL

STEPS, SAMPLES, DIM, IMAGES, NOISE, MOMENTUM, TEMPERATURE, LR = 4, 8, 6, 11, 20, 0.5, 0.2, 0.1


def batch(step: int) -> Batch:
    """A batch whose images come again in later steps, when their rows have moved."""
    generator = torch.Generator().manual_seed(step)
    views = torch.randn(SAMPLES, 2, 3, 16, 16, generator=generator, dtype=torch.float64)
    index = torch.randperm(IMAGES, generator=generator)[:SAMPLES]
    return make_batch(views, index, torch.zeros(SAMPLES, dtype=torch.int64))


def indices(index: Tensor, step: int, view: int) -> Tensor:
    """(n, K + 1): the images, then the noise that our method draws."""
    noise = [
        [int(uniform(np.uint64(key(0, step, i, view)), draw) * IMAGES) for draw in range(NOISE)] for i in index.tolist()
    ]
    return torch.cat([index[:, None], torch.tensor(noise)], 1)


class NCEAverage:
    """lemniscate's class, with its memory updated by update_memory after the gradient, as in vissl."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.Z = memory.clone(), -1.0

    def __call__(self, x: Tensor, idx: Tensor) -> Tensor:
        weight = self.memory[idx]
        out = torch.bmm(weight, x[:, :, None]).div(TEMPERATURE).exp()[..., 0]
        if self.Z < 0:
            self.Z = out.mean().item() * IMAGES
        return out / self.Z

    def update_memory(self, x: Tensor, y: Tensor) -> None:
        weight_pos = self.memory[y].mul(MOMENTUM).add(x.detach() * (1 - MOMENTUM))
        self.memory[y] = weight_pos / weight_pos.pow(2).sum(1, keepdim=True).pow(0.5)


def nce_criterion(x: Tensor) -> Tensor:
    """Without its eps of 1e-7."""
    pnt = 1 / IMAGES
    pmt = x[:, 0]
    ln_pmt = (pmt / (pmt + NOISE * pnt)).log()
    ln_pon = (NOISE * pnt / (x[:, 1:] + NOISE * pnt)).log()
    return -(ln_pmt.sum(0) + ln_pon.sum()) / len(x)


def step_of(method: InstanceDiscrimination, optimizer: torch.optim.Optimizer, step: int) -> Tensor:
    z = method.embed(batch(step))
    loss = method.loss(z, {}, batch(step))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    method.update(
        {name: x.detach() for name, x in z.items()}, {}, batch(step).replaced(clock=Clock(step, STEPS, STEPS))
    )
    return loss.detach()


@pytest.mark.parametrize("form", ["nce", "softmax"])
def test_instance_discrimination_trains_as_its_authors(form: str) -> None:
    torch.manual_seed(0)
    method = InstanceDiscrimination(
        ConvNet(2),
        form=form,  # pyright: ignore[reportArgumentType]
        noise=NOISE,
        temperature=TEMPERATURE,
        momentum=MOMENTUM,
        dim=DIM,
    )
    method.prepare(DataFacts(IMAGES, 1))
    method.double()
    theirs, lemniscate = copy.deepcopy(nn.Sequential(method.encoder, method.head)), NCEAverage(method.bank.rows)
    ours_optimizer = torch.optim.SGD(method.parameters(), LR)
    optimizer = torch.optim.SGD(theirs.parameters(), LR)
    for step in range(STEPS):
        x, y = F.normalize(theirs(batch(step).views[0][:, 0]), dim=1), batch(step).index
        if form == "nce":
            want = nce_criterion(lemniscate(x, indices(y, step, 0)))
        else:
            want = F.cross_entropy(x @ lemniscate.memory.clone().T / TEMPERATURE, y)
        optimizer.zero_grad()
        want.backward()
        optimizer.step()
        lemniscate.update_memory(x, y)
        assert_close(step_of(method, ours_optimizer, step), want, rtol=1e-12, atol=0)
    assert_close(method.bank.rows, lemniscate.memory, rtol=1e-12, atol=1e-12)


def test_pirl_trains_as_its_authors() -> None:
    torch.manual_seed(0)
    method = PIRL(ConvNet(2), noise=NOISE, temperature=TEMPERATURE, momentum=MOMENTUM, pretext=0.3, dim=DIM)
    method.prepare(DataFacts(IMAGES, 1))
    method.double()
    theirs = copy.deepcopy(method)
    nce_average = NCEAverage(method.bank.rows)
    ours_optimizer = torch.optim.SGD(method.parameters(), LR)
    optimizer = torch.optim.SGD(theirs.parameters(), LR)
    for step in range(STEPS):
        image, jigsaw = batch(step).views[0].unbind(1)
        towers = theirs.patch_head(theirs.encoder(patches(jigsaw).reshape(-1, 3, 4, 4)))
        outputs = [theirs.joined_head(towers.view(SAMPLES, -1)), theirs.head(theirs.encoder(image))]
        jigsaw, image = (F.normalize(output, dim=1) for output in outputs)
        y = batch(step).index
        if step == 0:  # ours estimates Z from both
            both = torch.cat([nce_average(image, indices(y, 0, 0)), nce_average(jigsaw, indices(y, 0, 1))])
            first = nce_average.Z
            nce_average.Z = first * both.mean().item() * IMAGES
        want = 0.7 * nce_criterion(nce_average(image, indices(y, step, 0)))
        want = want + 0.3 * nce_criterion(nce_average(jigsaw, indices(y, step, 1)))
        optimizer.zero_grad()
        want.backward()
        optimizer.step()
        nce_average.update_memory(image, y)
        assert_close(step_of(method, ours_optimizer, step), want, rtol=1e-12, atol=0)
    assert_close(method.bank.rows, nce_average.memory, rtol=1e-12, atol=1e-12)
