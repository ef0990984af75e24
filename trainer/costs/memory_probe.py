"""Measures the free memory, and the memory that a forward and a backward take."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kilobatch.trainer.costs import machine_memory


class Cost(NamedTuple):
    """Bytes. held: in use between forward and backward, the output included; peak: the most in use in either."""

    held: int
    peak: int


def cost(forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device) -> Cost:
    """Runs backward(forward()) once and measures its memory.

    On an accelerator the allocator's statistics are read. On a CPU every operation's outputs are counted while they
    live, which leaves out what an operation allocates for itself.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        output = forward()
        held = torch.cuda.memory_allocated(device) - before
        backward(output)
        return Cost(held, torch.cuda.max_memory_allocated(device) - before)
    with MemoryTracker() as tracker:
        output = forward()
        held = tracker.live
        backward(output)
    return Cost(held, tracker.peak)


class MemoryTracker(TorchDispatchMode):
    """Counts the bytes of operations' outputs that are still alive: now, at the peak, and by label.

    Bytes are counted under the value that `label` had when they were allocated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self.live = self.peak = 0
        self.labelled: Counter[str] = Counter()  # live, by label
        self.at_peak: Counter[str] = Counter()
        self._label_of: dict[int, str] = {}  # by a storage's id

    def restart(self) -> None:
        """Begins a new peak with what is alive now."""
        self.peak, self.at_peak = self.live, self.labelled.copy()

    def relabel(self, x: Tensor, label: str) -> None:
        """Moves x, which was allocated under another label, to this label."""
        storage = x.untyped_storage()
        if id(storage) in self._label_of:
            self.labelled[self._label_of[id(storage)]] -= storage.nbytes()
            self._label_of[id(storage)] = label
            self.labelled[label] += storage.nbytes()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(storage := x.untyped_storage()) not in inputs | self._label_of.keys():
                self._label_of[id(storage)] = self.label
                self.live += storage.nbytes()
                self.labelled[self.label] += storage.nbytes()
                weakref.finalize(storage, self._drop, id(storage), storage.nbytes()).atexit = False
        if self.live > self.peak:
            self.restart()
        return out

    def _drop(self, storage: int, size: int) -> None:
        self.live -= size
        self.labelled[self._label_of.pop(storage)] -= size


def free_memory(device: torch.device, sharing: int) -> int:
    """Bytes that this process may still allocate.

    sharing: how many processes of this machine share its memory; a CUDA device belongs to one process alone.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return machine_memory.free() // sharing
