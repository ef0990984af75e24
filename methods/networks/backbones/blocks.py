"""The blocks of a network that says nothing of them: to be computed again in the backward, and for layer decay."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from kilobatch.methods.networks.encoder import compute_again

SMALLEST = 3  # layers with weights of a block: a convolution and its norm, or an MLP, saves too little by itself
CONTAINERS = (nn.ModuleList, nn.ModuleDict)  # are not called themselves


def find_blocks(network: nn.Module) -> list[tuple[str, nn.Module]]:
    """The blocks of a network with their names, in the order in which it has them.

    A part is taken for a stage, of which the blocks count, where most of its weights lie in parts of at least SMALLEST
    layers, and else for a block.
    """
    return list(_blocks(network, ""))


def _blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        inner = list(_blocks(child, f"{prefix}{name}."))
        if isinstance(child, CONTAINERS) or 2 * sum(_size(block) for _, block in inner) > _size(child):
            yield from inner
        elif _layers(child) >= SMALLEST:
            yield f"{prefix}{name}", child


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _layers(module: nn.Module) -> int:
    return sum(any(True for _ in m.parameters(recurse=False)) for m in module.modules())


def recompute(block: nn.Module) -> None:
    """Has a block keep its inputs alone from now on, and compute the rest again in the backward."""
    # Its forward, and not the block, is replaced: names of parameters stay, and hooks run once. A copy of the network,
    # such as a momentum encoder, has copies of the block in it.
    block.forward = partial(_recomputed, block)


def _recomputed(block: nn.Module, *inputs: Any, **options: Any) -> Any:
    plain = type(block).forward
    if not torch.is_grad_enabled():
        return plain(block, *inputs, **options)
    return compute_again(block, plain, block, *inputs, **options)


def depth_order(network: nn.Module) -> list[tuple[str, ...]]:
    """The names of the parameters by the network's parts: what comes before the first block, and each block with what
    lies between it and the block before. What follows the last block is left out; none where there are no blocks."""
    blocks = [name for name, _ in find_blocks(network)]
    parts: list[list[str]] = [[]]
    between: list[str] = []
    for name, _ in network.named_parameters():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if block is None:
            between.append(name)
            continue
        if len(parts) == 1 or parts[-1][0] != block:
            parts[0], added = (between, []) if len(parts) == 1 else (parts[0], between)
            parts.append([block, *added])
            between = []
    return [tuple(part) for part in parts if part] if len(parts) > 1 else []
