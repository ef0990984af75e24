"""Builds a recipe's optimizer: LARS of this project, SGD and AdamW of torch, LAMB of pytorch-optimizer."""

import torch
from torch import nn
from torch.optim import Optimizer

from kilobatch.trainer.optim.lars import LARS
from kilobatch.trainer.optim.options import OptimizerOptions, scaled_lr
from kilobatch.trainer.optim.parameter_groups import freeze_parameters, parameter_groups


def build_optimizer(options: OptimizerOptions, module: nn.Module, global_batch: int) -> Optimizer:
    """An optimizer over the module's trainable parameters, with the learning rate scaled_lr.

    Its groups are those of parameter_groups(): by rule, parameters with one dimension or none (biases, norms, scales)
    have no decay, but with options.decay_norms, and, in LARS and LAMB, no adaptation; a Method's groups(), and
    options.freeze and options.layer_decay, are exceptions. Each group's "names" are its parameters' names. The module
    must be on its device before. What is never trained loses its gradient here.

    Raises UserError where an exception of the recipe does not fit the module.
    """
    freeze_parameters(module, options)
    groups = parameter_groups(module, options)
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
