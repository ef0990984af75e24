"""Bytes that a rank's device holds at each moment of a step, from a step on tensors without data. Loads no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kilobatch.data.views.options import Views
from kilobatch.launch.planning.machines import FRAGMENTS, RESERVED, Machine
from kilobatch.trainer.costs.zero_memory import FP32, ZeroMemory, zero_memory

if TYPE_CHECKING:
    from kilobatch.launch.planning.fake_step import Layout, Step

AHEAD = 3  # data.loading.prefetch.AHEAD


@dataclass(frozen=True)
class Memory:
    """moment: when most is held; parts: bytes of what is held then, and `total` of them."""

    moment: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def memory(step: "Step", layout: "Layout", keep: int, zero: int, views: Views, machine: Machine) -> Memory:
    """At the moment of a step when a rank holds most. keep: chunks that keep their graph; zero: ZeRO's stage."""
    of_zero = _of_zero(step, layout, zero)
    always = {**step.held, **standing(of_zero)} | _loader(layout.samples, views, machine)
    moments = {
        name: always | _moment(name, parts, step, layout, keep, zero, of_zero) for name, parts in step.moments.items()
    }
    averaging = 0 if zero == 2 else of_zero.averaging
    updating = of_zero.updating if zero else step.updating
    moments["update"] = always | {"gradients": of_zero.gradients, "update": max(averaging, updating)}
    name, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    if machine.bandwidth is not None and machine.memory is not None:
        parts = parts | {"CUDA and fragments (assumed)": RESERVED + int(FRAGMENTS * machine.memory)}
    return Memory(name, {label: size for label, size in parts.items() if size})


def optimizer(step: "Step", layout: "Layout", zero: int) -> int:
    """Bytes of the optimizer with what ZeRO keeps beside it."""
    return sum(standing(_of_zero(step, layout, zero)).values())


def standing(of_zero: ZeroMemory) -> dict[str, int]:
    """What optimizer and ZeRO hold from step to step."""
    return {"optimizer": of_zero.moments, "ZeRO's fp32 masters": of_zero.masters}


def _of_zero(step: "Step", layout: "Layout", zero: int) -> ZeroMemory:
    moments = round(step.state / (FP32 * step.trained))
    return zero_memory(step.groups, zero, layout.ranks, moments=moments, chunks=layout.chunks)


def _moment(
    name: str,
    parts: Mapping[str, int],
    step: "Step",
    layout: "Layout",
    keep: int,
    zero: int,
    of_zero: ZeroMemory,
) -> dict[str, int]:
    """What is there beside at a moment of forward and backward."""
    found = dict(parts)
    going_back = name == "backward"
    if layout.chunks > 1 and name != "targets":
        # The step that was looked at has one graph; the kept ones are all there until the last goes back.
        graphs = {"loss": keep, "backward": max(keep, 1)}.get(name, 1)
        found["activations"] = found.get("activations", 0) + (graphs - 1) * step.kept
    if layout.chunks > 1 and going_back:
        found["gradients"] = FP32 * step.trained  # of the chunks before
    if zero == 2 and going_back:
        found["gradients"] = of_zero.gradients + of_zero.averaging
    return found


def _loader(samples: int, views: Views, machine: Machine) -> dict[str, int]:
    """Batches that wait, one that is being made and one in use. A GPU's wait as bytes."""
    pixels = samples * views.count * 3 * views.size**2
    on_gpu = machine.bandwidth is not None
    return {"views": (AHEAD + 1) * pixels * (1 if on_gpu else FP32) + FP32 * pixels}
