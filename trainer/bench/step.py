"""Measures a whole step of SimCLR or of a recipe, and the encoder's forward and backward alone on the same views."""

import torch
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode

from kilobatch.data.batch import Batch, make_batch
from kilobatch.methods.method import Method
from kilobatch.methods.networks import batch_norm, build, keyed_layers
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer.bench.rates import BenchRow, best, gemm
from kilobatch.trainer.engine import AUTOCAST, Engine, has_bf16_units
from kilobatch.trainer.optim import optimizers
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.options import EngineOptions, Precision
from kilobatch.trainer.step import check_finite, forward_backward

SECONDS = 2.0  # of each measurement


def rows(device: torch.device) -> tuple[list[BenchRow], float]:
    """The rows in each precision that the device has units for, and the floating-point operations a second of the whole
    step in the last of them, which is the one that engine.precision auto stands for.

    Needs a process group of this process alone.
    """
    table, rate = _rows_in("fp32", device)
    if has_bf16_units(device):
        in_bf16, rate = _rows_in("bf16", device)
        table += in_bf16
    return table, rate


def _rows_in(precision: Precision, device: torch.device) -> tuple[list[BenchRow], float]:
    on_gpu = device.type == "cuda"
    samples, side = (128, 224) if on_gpu else (128, 32)
    options = EncoderOptions(name="resnet50" if on_gpu else "convnet")
    torch.manual_seed(0)
    method = SimCLR(build.build_encoder(options)).to(device)
    engine = Engine(
        method,
        optimizers.build_optimizer(OptimizerOptions(), method, samples),
        EngineOptions(precision=precision, chunks=1),
        device,
        samples,
    )
    return measure(engine, random_batch(samples, side, device), "SimCLR", f"{options.name}, {side} pixels, {precision}")


def rows_of(
    method: Method, optimizer: Optimizer, options: EngineOptions, batch: Batch, name: str, encoder: str
) -> list[BenchRow]:
    """The rows of a method, on its device, on a batch whose pixels are drawn here. options: its chunks are 1; name: of
    the method; encoder: of its encoder, for the table. Needs a process group of this process alone."""
    device = next(method.parameters()).device
    engine = Engine(method, optimizer, options, device, len(batch))
    drawn = batch.replaced(views=tuple(torch.randn_like(group) for group in batch.views)).on(device)
    pixels = " + ".join(f"{group.shape[1]} x {group.shape[-1]}" for group in batch.views)
    return measure(engine, drawn, name, f"{len(batch)} images, {encoder}, {pixels} pixels, {options.precision}")[0]


def measure(engine: Engine, batch: Batch, name: str, what: str) -> tuple[list[BenchRow], float]:
    """The rows of an engine's step on this batch, and its floating-point operations a second."""
    samples, device, precision = len(batch), engine.device, engine.options.precision
    with FlopCounterMode(display=False) as count:
        encoder_pass(engine, batch)
    operations = count.get_total_flops()
    encoder_alone = best(lambda: encoder_pass(engine, batch), device, SECONDS)
    whole_step = best(lambda: train_step(engine, batch), device, SECONDS)
    peak = gemm(device, AUTOCAST.get(precision, torch.float32))
    table = [
        BenchRow(
            f"{name} step, {what}",
            samples / whole_step,
            samples / encoder_alone,
            "images",
            "the encoder's forward and backward",
        ),
        BenchRow(
            f"forward and backward, {what}", operations / encoder_alone, peak, "FLOP", f"matrix product, {precision}"
        ),
    ]
    return table, operations / whole_step


def random_batch(samples: int, side: int, device: torch.device) -> Batch:
    """Two views of random pixels for each sample, with label 0."""
    views = torch.randn(samples, 2, 3, side, side, device=device)
    return make_batch(views, label=torch.zeros(samples, dtype=torch.int64, device=device))


def encoder_pass(engine: Engine, batch: Batch) -> None:
    """The encoder's forward and backward alone, on each group of views."""
    with engine.autocast(), keyed_layers.drawing(engine.method, batch.keys):
        features = [engine.method.encoder(views.flatten(0, 1)) for views in batch.views]
    torch.stack([x.float().sum() for x in features]).sum().backward()
    engine.method.zero_grad()


def train_step(engine: Engine, batch: Batch) -> None:
    """A training step as Loop takes it, without loader, log and checkpoint."""
    outcome = forward_backward(engine, batch)
    check_finite(engine, outcome, 0)
    engine.step(1e-3)
    batch_norm.commit(engine.method)
    engine.method.update(outcome.z, outcome.t, outcome.batch)
