"""Imports DeepSpeed as a worker needs it."""

import logging
import os
import sys
from typing import Any

import torch


def import_deepspeed(device: torch.device) -> Any:
    """The module, imported with the environment that it reads then, and without triton on a CPU."""
    # Otherwise DeepSpeed chooses an accelerator that this run may not use, and warns of it.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    # On a machine without CUDA this logger warns that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # On a CPU it imports triton only to find that there is no GPU, a tenth of the time of a worker's imports.
    hidden = device.type == "cpu" and "triton" not in sys.modules
    if hidden:
        sys.modules["triton"] = None  # pyright: ignore[reportArgumentType]  # as for one that is not installed
    try:
        import deepspeed
        import deepspeed.ops

        # A ZeRO engine imports it when it is collected. Where that happens while another import takes its lock, CPython
        # 3.11 raises KeyError from the lock (python/cpython issue 106176).
        import deepspeed.utils.pin_memory
    finally:
        if hidden:
            del sys.modules["triton"]

    # DeepSpeed's shared-memory all-reduce for CPUs needs a C++ compiler and up to a minute on first use, and its
    # segments outlive a killed worker. The tests run on gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
