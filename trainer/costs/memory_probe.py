"""How much memory there is, and how much a piece of work takes."""

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
    """Bytes. held: what forward leaves for backward, its output with it; peak: the most in use in either."""

    held: int
    peak: int


def cost(forward: Callable[[], Any], backward: Callable[[Any], Any], device: torch.device) -> Cost:
    """Runs backward(forward()) once. On an accelerator its allocator is asked; on a CPU every operation's outputs are
    counted while they live, which leaves out what an operation takes for itself."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        found = forward()
        held = torch.cuda.memory_allocated(device) - before
        backward(found)
        return Cost(held, torch.cuda.max_memory_allocated(device) - before)
    with Watch() as watch:
        found = forward()
        held = watch.live
        backward(found)
    return Cost(held, watch.peak)


class Watch(TorchDispatchMode):
    """Counts the bytes that operations have made and nobody has dropped yet: live, and at the peak, also by the label
    that stood when they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self.live = self.peak = 0
        self.labelled: Counter[str] = Counter()  # live, by label
        self.at_peak: Counter[str] = Counter()
        self._known: dict[int, str] = {}

    def restart(self) -> None:
        """The peak counts from here on."""
        self.peak, self.at_peak = self.live, self.labelled.copy()

    def relabel(self, x: Tensor, label: str) -> None:
        """x, which was made under another label, is counted with this one from here on."""
        storage = x.untyped_storage()
        if id(storage) in self._known:
            self.labelled[self._known[id(storage)]] -= storage.nbytes()
            self._known[id(storage)] = label
            self.labelled[label] += storage.nbytes()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and id(storage := x.untyped_storage()) not in given | self._known.keys():
                self._known[id(storage)] = self.label
                self.live += storage.nbytes()
                self.labelled[self.label] += storage.nbytes()
                weakref.finalize(storage, self._drop, id(storage), storage.nbytes()).atexit = False
        if self.live > self.peak:
            self.restart()
        return out

    def _drop(self, storage: int, size: int) -> None:
        self.live -= size
        self.labelled[self._known.pop(storage)] -= size


def free(device: torch.device, sharing: int) -> int:
    """Bytes that this process may still take, where `sharing` processes of this machine take them at the same time; a
    CUDA device is one process's own."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min(_machine(), *_groups()) // sharing


def _machine() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _groups(root: Path = CGROUPS, of: str = "/proc/self/cgroup") -> Iterator[int]:
    """What each limit on this process's group, or on one above it, leaves: a job's, a container's. Files that the
    kernel can drop count as free."""
    for line in Path(of).read_text().splitlines():
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
                yield from _left(folder, *names)


def _left(folder: Path, limit: str, used: str, droppable: str) -> Iterator[int]:
    most = (folder / limit).read_text().strip()
    if most == "max":
        return
    kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    yield int(most) - int((folder / used).read_text()) + int(kept[droppable])
