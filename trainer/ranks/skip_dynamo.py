"""Keeps torch from importing its compiler, which takes 2 s of each worker's start, where no optimizer is compiled."""

import inspect

import torch
from torch.optim import SGD, AdamW, Optimizer

_MARKED = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def skip_dynamo() -> None:
    """Removes the decorators by which torch marks these optimizer methods for its compiler.

    At their first call they import the compiler (2 s) and do nothing else, but that step's also switches gradients off,
    so no_grad is put back. Call it before the first optimizer, in a process that compiles no
    optimizer; its networks it may compile.
    """
    for name in _MARKED:
        setattr(Optimizer, name, inspect.unwrap(getattr(Optimizer, name)))
    for kind in (SGD, AdamW):
        kind.step = torch.no_grad()(inspect.unwrap(kind.step))
