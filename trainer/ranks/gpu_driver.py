"""Tells whether this machine has a GPU's driver, without torch, which takes seconds to load."""

from pathlib import Path

DEV = Path("/dev")
# Of NVIDIA's drivers (also Jetson's), AMD's and WSL's: without one of these torch cannot reach a GPU.
DRIVER_FILES = ("nvidia*", "nvhost*", "nvgpu*", "kfd", "dxg")


def has_gpu_driver() -> bool:
    """Returns whether there may be a GPU; only torch knows whether there is."""
    return any(any(DEV.glob(name)) for name in DRIVER_FILES)
