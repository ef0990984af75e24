"""A whole SimCLR step against the bare encoder's forward and backward on the same views."""

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kilobatch.data.batch import Batch
from kilobatch.methods.networks import batch_norm as norm
from kilobatch.methods.networks import build as encoders
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.bench.rates import Row, best, gemm
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.optim import optimizers
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.step import check_finite, forward_backward


def rows(device: torch.device) -> tuple[list[Row], float]:
    """Inside a process group of this process alone. Returns the rows, and the floating-point operations a second of
    the whole step."""
    on_gpu = device.type == "cuda"
    samples, side = (128, 224) if on_gpu else (128, 32)
    options = EncoderOptions(name="resnet50" if on_gpu else "convnet")
    precision = "bf16" if on_gpu else "fp32"
    torch.manual_seed(0)
    method = SimCLR(encoders.build(options)).to(device)
    engine = Engine(
        method,
        optimizers.build(OptimizerOptions(), method, samples),
        EngineOptions(precision=precision, chunks=1),
        device,
        samples,
    )
    batch = noise(samples, side, device)
    with FlopCounterMode(display=False) as count:
        bare(engine, batch.views)
    operations = count.get_total_flops()
    limit, ours = best(lambda: bare(engine, batch.views), device, 2), best(lambda: whole(engine, batch), device, 2)
    peak = gemm(device, torch.bfloat16 if on_gpu else torch.float32)
    what = f"{options.name}, {side} pixels, {precision}"
    found = [
        Row(f"SimCLR step, {what}", samples / ours, samples / limit, "images", "the encoder's forward and backward"),
        Row(f"forward and backward, {what}", operations / limit, peak, "FLOP", f"matrix product, {precision}"),
    ]
    return found, operations / ours


def noise(samples: int, side: int, device: torch.device) -> Batch:
    """Two views of each sample, without content or label."""
    index = torch.arange(samples, device=device)
    return Batch(torch.randn(samples, 2, 3, side, side, device=device), index, torch.zeros_like(index))


def bare(engine: Engine, views: Tensor) -> None:
    """The encoder's forward and backward alone."""
    with engine.autocast():
        features = engine.method.encoder(views.flatten(0, 1))
    features.float().sum().backward()
    engine.method.zero_grad()


def whole(engine: Engine, batch: Batch) -> None:
    """A step as the loop has it, without loader, log and checkpoint."""
    outcome = forward_backward(engine, batch)
    check_finite(engine, outcome, 0)
    engine.step(1e-3)
    norm.commit(engine.method)
    engine.method.update(outcome.z, outcome.t, batch, 0.5)
