"""Computes the bytes that a rank's device holds at each moment of a step, from a step on fake tensors. Loads no
torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kilobatch.data.views.groups import ViewGroups, pixels_of_views
from kilobatch.launch.planning.machines import FRAGMENTS, RESERVED, Machine
from kilobatch.trainer.costs.zero_memory import FP32, ZeroMemory, zero_memory

if TYPE_CHECKING:
    from kilobatch.launch.planning.fake_step import Step, StepLayout

AHEAD = 3  # data.loading.prefetch.AHEAD
ASSUMED_PART = "CUDA and fragments (assumed)"  # the part of a peak that is not counted


@dataclass(frozen=True)
class MemoryPeak:
    """The moment of a step at which most memory is held. parts: bytes by label at that moment; total: their sum."""

    moment: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def peak_memory(
    step: "Step", layout: "StepLayout", keep: int, zero: int, views: ViewGroups, machine: Machine
) -> MemoryPeak:
    """The memory of a rank at its peak in a step. keep: chunks that keep their graph; zero: ZeRO's stage."""
    of_zero = _of_zero(step, layout, zero)
    always = {**step.held, **persistent_bytes(of_zero)} | _loader(layout.samples, views, machine)
    moments = {
        name: always | _moment(name, parts, step, layout, keep, zero, of_zero) for name, parts in step.moments.items()
    }
    averaging = 0 if zero == 2 else of_zero.averaging
    updating = of_zero.updating if zero else step.updating
    moments["update"] = always | {"gradients": of_zero.gradients, "update": max(averaging, updating)}
    name, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    if machine.bandwidth is not None and machine.memory is not None:
        parts = parts | {ASSUMED_PART: RESERVED + int(FRAGMENTS * machine.memory)}
    return MemoryPeak(name, {label: size for label, size in parts.items() if size})


def optimizer_bytes(step: "Step", layout: "StepLayout", zero: int) -> int:
    """Bytes of the optimizer's state and of the copies that ZeRO keeps."""
    return sum(persistent_bytes(_of_zero(step, layout, zero)).values())


def persistent_bytes(of_zero: ZeroMemory) -> dict[str, int]:
    """Bytes that optimizer and ZeRO hold from step to step, by label."""
    return {"optimizer": of_zero.moments, "ZeRO's fp32 masters": of_zero.masters}


def _of_zero(step: "Step", layout: "StepLayout", zero: int) -> ZeroMemory:
    moments = round(step.state / (FP32 * step.trained))
    return zero_memory(step.groups, zero, layout.ranks, moments=moments, chunks=layout.chunks)


def _moment(
    name: str,
    parts: Mapping[str, int],
    step: "Step",
    layout: "StepLayout",
    keep: int,
    zero: int,
    of_zero: ZeroMemory,
) -> dict[str, int]:
    """Bytes at a moment of forward and backward, besides what is always held; by label."""
    found = dict(parts)
    backward = name == "backward"
    if layout.chunks > 1 and name != "targets":
        # The fake step had one graph. At the loss all kept graphs exist, and until the backward of the last one.
        graphs = {"loss": keep, "backward": max(keep, 1)}.get(name, 1)
        found["activations"] = found.get("activations", 0) + (graphs - 1) * step.kept
    if layout.chunks > 1 and backward:
        found["gradients"] = FP32 * step.trained  # summed over the chunks before
    if zero == 2 and backward:
        found["gradients"] = of_zero.gradients + of_zero.averaging
    return found


def waiting_bytes(samples: int, views: ViewGroups, machine: Machine) -> int:
    """Bytes of the batches that wait where the loader is ahead. For a GPU they are uint8."""
    return AHEAD * _pixels(samples, views) * _pixel_bytes(machine)


def _loader(samples: int, views: ViewGroups, machine: Machine) -> dict[str, int]:
    """Bytes of the batches that wait, of the one that is being made, and of the one in use."""
    pixels = _pixels(samples, views)
    return {"views": waiting_bytes(samples, views, machine) + pixels * (_pixel_bytes(machine) + FP32)}


def _pixels(samples: int, views: ViewGroups) -> int:
    return samples * 3 * pixels_of_views(views)


def _pixel_bytes(machine: Machine) -> int:
    return FP32 if machine.bandwidth is None else 1
