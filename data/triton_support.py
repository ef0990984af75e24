"""Decides whether operations run as Triton kernels, for data and methods alike; where not, torch's operations run.

KILOBATCH_KERNELS in the environment: `off` uses no kernels; `all` uses them also where they are expected to be slower.
"""

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

MIN_CAPABILITY = (8, 0)  # compute capability: from there on tensor cores take bf16 and tf32
SETTING = os.environ.get("KILOBATCH_KERNELS", "")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it when kernels are defined: any device will do

log = logging.getLogger("kilobatch")


@cache
def use_kernels(operation: str, device: torch.device, unsupported: str | None = None) -> bool:
    """Whether an operation runs as Triton kernels on this device; logged once for each operation and device.

    operation: its name in the log. unsupported: the reason for which the kernels cannot do it; None: they can.
    """
    reason = obstacle(device) or unsupported
    if reason:
        log.info(f"{operation}: torch's operations, as {reason}")
    else:
        log.info(f"{operation}: Triton's kernels{', interpreted' if INTERPRETED else ''}")
    return reason is None


def obstacle(device: torch.device) -> str | None:
    """The reason for which no kernels run on this device; None: they do."""
    if SETTING == "off":
        return "KILOBATCH_KERNELS is off"
    if find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"kernels are for NVIDIA's GPUs and the device is {device.type}"
    (major, minor), (least_major, least_minor) = torch.cuda.get_device_capability(device), MIN_CAPABILITY
    if (major, minor) < MIN_CAPABILITY:
        return f"this GPU's compute capability {major}.{minor} is below {least_major}.{least_minor}"
    return None
