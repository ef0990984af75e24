"""Measures the free memory, and the memory that a forward and a backward take."""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CGROUPS = Path("/sys/fs/cgroup")


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
    return min(_free_of_machine(), *_free_of_groups()) // sharing


def _free_of_machine() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _free_of_groups(root: Path = CGROUPS, groups: str = "/proc/self/cgroup") -> Iterator[int]:
    """Yields the free bytes under each memory limit on this process's control group and on those above it, such as a
    job's or a container's. Cached files that the kernel can drop count as free."""
    for line in Path(groups).read_text().splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers == "":
            names, top = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):
            names, top = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"), root / "memory"
        else:
            continue
        group = top / inside.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top) and (folder / names[0]).exists():
                yield from _free_under(folder, *names)


def _free_under(folder: Path, limit: str, used: str, droppable: str) -> Iterator[int]:
    """Yields the free bytes under one group's limit; nothing where it has none."""
    bound = (folder / limit).read_text().strip()
    if bound == "max":
        return
    statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    yield int(bound) - int((folder / used).read_text()) + int(statistics[droppable])
