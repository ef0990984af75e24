"""Whether Triton's kernels run, decided here alone, for data and methods alike; elsewhere torch's operations do.

KILOBATCH_KERNELS in the environment: off, nowhere; all, also where they are expected to be the slower form.
"""

import logging
import os
from functools import cache
from importlib.util import find_spec

import torch

LEAST = (8, 0)  # compute capability: from there on tensor cores take bf16 and tf32
ASKED = os.environ.get("KILOBATCH_KERNELS", "")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as triton reads it when kernels are defined: on any device

log = logging.getLogger("kilobatch")


@cache
def fused(what: str, device: torch.device, beyond: str | None = None) -> bool:
    """Whether `what` runs as kernels on this device; said once for each. beyond: what the kernels cannot do of it."""
    reason = obstacle(device) or beyond
    if reason:
        log.info(f"{what}: torch's operations, as {reason}")
    else:
        log.info(f"{what}: Triton's kernels{', interpreted' if INTERPRETED else ''}")
    return reason is None


def obstacle(device: torch.device) -> str | None:
    """Why there can be no kernels on this device."""
    if ASKED == "off":
        return "KILOBATCH_KERNELS is off"
    if find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if device.type != "cuda" or torch.version.hip is not None:
        return f"kernels are for NVIDIA's GPUs and the device is {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST:
        return f"this GPU's compute capability {capability[0]}.{capability[1]} is below {LEAST[0]}.{LEAST[1]}"
    return None
