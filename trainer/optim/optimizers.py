"""Builds a recipe's optimizer: LARS of this project, SGD and AdamW of torch, LAMB of pytorch-optimizer."""

from math import sqrt
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.optim.options import OptimizerOptions


def scaled_lr(options: OptimizerOptions, global_batch: int) -> float:
    """The base learning rate of the schedule. SimCLR's 0.3·B/256 and 0.075·√B are equal at B = 4096 (section B.1)."""
    factors = {"none": 1.0, "linear": global_batch / 256, "sqrt": sqrt(global_batch)}
    return options.lr * factors[options.scaling]


def build_optimizer(options: OptimizerOptions, module: nn.Module, global_batch: int) -> Optimizer:
    """An optimizer over the module's trainable parameters, in up to three groups, with the learning rate scaled_lr.

    Parameters with one dimension or none (biases, norms, scales) have no decay and, in LARS and LAMB, no adaptation;
    those that the module lists in `unadapted` have decay alone. Each group's "names" are its parameters' names. The
    module must be on its device before.
    """
    groups = [group for group in parameter_groups(module, options.weight_decay) if group["params"]]
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


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Three groups, any of which may be empty: decayed and adapted, decayed only, neither."""
    unadapted = getattr(module, "unadapted", ())
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]

    def group(members: list[tuple[str, nn.Parameter]], decay: float, adapt: bool) -> dict[str, Any]:
        names, params = [name for name, _ in members], [p for _, p in members]
        return {"params": params, "names": names, "weight_decay": decay, "adapt": adapt}

    return [
        group([(name, p) for name, p in named if p.ndim > 1 and name not in unadapted], weight_decay, True),
        group([(name, p) for name, p in named if p.ndim > 1 and name in unadapted], weight_decay, False),
        group([(name, p) for name, p in named if p.ndim <= 1], 0.0, False),
    ]
