"""Builds a recipe's optimizer: LARS of this project, SGD and AdamW of torch, LAMB of pytorch-optimizer."""

from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.optim.options import OptimizerOptions, scaled_lr


def build_optimizer(options: OptimizerOptions, module: nn.Module, global_batch: int) -> Optimizer:
    """An optimizer over the module's trainable parameters, in up to four groups, with the learning rate scaled_lr.

    Parameters with one dimension or none (biases, norms, scales) have no decay, but with options.decay_norms, and, in
    LARS and LAMB, no adaptation; those that the module lists in `unadapted` have decay alone, and those of one
    dimension in `undecayed` none in any case. Each group's "names" are its parameters' names. The module must be on its
    device before.
    """
    groups = [group for group in parameter_groups(module, options.weight_decay, options.decay_norms) if group["params"]]
    lr = scaled_lr(options, global_batch)
    match options.name:
        case "lars":
            return LARS(
                groups,
                lr,
                momentum=options.momentum,
                trust_coefficient=options.trust_coefficient,
                nesterov=options.nesterov,
                dialect=options.dialect,
            )
        case "sgd":
            return torch.optim.SGD(groups, lr, momentum=options.momentum, nesterov=options.nesterov, foreach=True)
        case "adamw":
            return torch.optim.AdamW(groups, lr, betas=options.betas, eps=options.epsilon, foreach=True)
        case "lamb":
            from pytorch_optimizer import Lamb  # a second to import

            # You et al., 2020, algorithm 2 of version 3 (arxiv.org/abs/1904.00962v3): the decay is part of the adapted
            # update, and moments are not corrected for their start from zero, because warm-up makes up for it. "adam"
            # switches the trust ratio off; "adam_debias" switches off a correction of the rate by 1/(1 - β1^t), which
            # is ten times lr in the first step.
            lamb = [{**group, "adam": not group["adapt"], "adam_debias": True} for group in groups]
            return Lamb(lamb, lr, betas=options.betas, eps=options.epsilon, weight_decouple=False, foreach=True)


def parameter_groups(module: nn.Module, weight_decay: float, decay_norms: bool = False) -> list[dict[str, Any]]:
    """Four groups, any of which may be empty: decayed and adapted; decayed only; with decay_norms those with one
    dimension or none; and what is neither adapted nor decayed."""
    unadapted, undecayed = getattr(module, "unadapted", ()), getattr(module, "undecayed", ())
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    vectors = [(name, p) for name, p in named if p.ndim <= 1]
    kept = {name for name, _ in vectors if not decay_norms or name in undecayed}

    def group(members: list[tuple[str, nn.Parameter]], decay: float, adapt: bool) -> dict[str, Any]:
        names, params = [name for name, _ in members], [p for _, p in members]
        return {"params": params, "names": names, "weight_decay": decay, "adapt": adapt}

    return [
        group([(name, p) for name, p in named if p.ndim > 1 and name not in unadapted], weight_decay, True),
        group([(name, p) for name, p in named if p.ndim > 1 and name in unadapted], weight_decay, False),
        group([(name, p) for name, p in vectors if name not in kept], weight_decay, False),
        group([(name, p) for name, p in vectors if name in kept], 0.0, False),
    ]
