"""Measures within seconds how quickly this machine's CPU trains a recipe's encoder, where no bench has measured it."""

import os

from kilobatch.data.cpus import spare_threads
from kilobatch.launch.planning.machines import VIEWS_PER_CORE, Measured, find_machine, precision_on
from kilobatch.launch.recipes.recipe import Recipe

SECONDS, IMAGES = 2.0, 16  # of the measurement, after a first pass; what it passes through the encoder


def measure_own_rate(recipe: Recipe) -> Measured:
    """The rate of one worker that has the machine for itself. The loader's is the assumed one."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from kilobatch.methods.networks.build import build_encoder
    from kilobatch.methods.networks.keyed_layers import drawing
    from kilobatch.trainer.bench.rates import best
    from kilobatch.trainer.engine import autocast

    size, precision = recipe.data.groups[0].size, precision_on(find_machine("cpu"))
    with torch.random.fork_rng(devices=[]):
        encoder, images = build_encoder(recipe.encoder, [size]), torch.randn(IMAGES, 3, size, size)

    def forward_and_backward() -> None:
        with autocast(recipe.engine.decided(precision).precision, "cpu"), drawing(encoder, torch.arange(IMAGES)):
            features = encoder(images)
        features.float().sum().backward()
        encoder.zero_grad()

    with FlopCounterMode(display=False) as counter:
        forward_and_backward()
    seconds = best(forward_and_backward, torch.device("cpu"), SECONDS, least=1)
    flops = counter.get_total_flops() / seconds
    load, cores = os.getloadavg()[0], spare_threads(1)
    busy = f", while other programs kept it busy (load {load:.0f} on {cores} cores)" if load > 1.5 * cores else ""
    described = f"this machine just now with {IMAGES} images at once{busy}"
    return Measured(device="cpu", flops=flops, views=VIEWS_PER_CORE["cpu"], described=described, whole=False)
