"""Keeps torch from importing its compiler, 2 s of each worker's start, where no optimizer is compiled."""

import inspect

import torch
from torch.optim import SGD, AdamW, Optimizer

_MARKED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def spare_the_compiler() -> None:
    """From here on these methods of optimizers are what they were before torch marked them: as not to be compiled, and
    step as one whose graph is to be broken. The marks do nothing but import the compiler at their first call, and
    step's switches gradients off. For a process that compiles at most its network, before its first optimizer.
    """
    for name in _MARKED:
        setattr(Optimizer, name, inspect.unwrap(getattr(Optimizer, name)))
    for kind in (SGD, AdamW):
        kind.step = torch.no_grad()(inspect.unwrap(kind.step))
