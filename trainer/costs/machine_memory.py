"""Reads how much memory this machine and its control groups have left, what a process holds, and how often the kernel
has killed for want of memory. Loads no torch."""

import resource
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
PROC = Path("/proc")
LIBRARIES = int(3.2 * 2**30)  # bytes of the address space that a worker's libraries take (measured: 3.21 GiB)


def free_of_machine() -> int:
    """Bytes that the kernel can give out without swapping."""
    return _meminfo("MemAvailable")


def free_of_groups(root: Path = CGROUPS, groups: Path = PROC / "self/cgroup") -> Iterator[int]:
    """Yields the free bytes under each memory limit on this process's control group and on those above it, such as a
    job's or a container's. Cached files that the kernel can drop count as free."""
    for folder, new in _groups(root, groups):
        names = (
            ("memory.max", "memory.current", "inactive_file")
            if new
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        if (folder / names[0]).exists():
            yield from _free_under(folder, *names)


def free() -> int:
    """Bytes that the processes of this control group can still get, without swapping."""
    return min(free_of_machine(), *free_of_groups())


def most_per_worker(workers: int) -> int:
    """The most bytes that each of so many workers, which have not started, can get on this machine's CPUs.

    Swap counts as memory: with it a step is slow, and not killed. A limit on the address space (ulimit -v) holds for
    each worker, whose libraries take some of it first.
    """
    each = (free() + _meminfo("SwapFree")) // workers
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return each
    return max(0, min(each, limit - LIBRARIES))


def held_by(process: int) -> int | None:
    """Bytes of memory that a process holds, without what it has mapped of files; None: it has ended."""
    try:
        lines = (PROC / str(process) / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    held = dict(line.split(":", 1) for line in lines)
    if "RssAnon" not in held:  # it ends, and its memory has been taken back
        return None
    return sum(int(held[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def kills_for_memory(root: Path = CGROUPS, groups: Path = PROC / "self/cgroup", kernel: Path = PROC / "vmstat") -> int:
    """How often the kernel has killed a process of this control group, or, where no group counts it, of this machine,
    for want of memory."""
    for folder, new in _groups(root, groups):
        file = folder / ("memory.events" if new else "memory.oom_control")
        if file.exists() and "oom_kill" in (counts := _numbers(file)):
            return counts["oom_kill"]
    return _numbers(kernel).get("oom_kill", 0)


def _meminfo(name: str) -> int:
    lines = (PROC / "meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _groups(root: Path, groups: Path) -> Iterator[tuple[Path, bool]]:
    """Yields the folders of the groups that count this process's memory, from the innermost one outwards, and whether
    each is of version 2."""
    for line in groups.read_text().splitlines():
        _, controllers, inside = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        group = top / inside.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                yield folder, not controllers


def _free_under(folder: Path, limit: str, used: str, droppable: str) -> Iterator[int]:
    """Yields the free bytes under one group's limit; nothing where it has none."""
    bound = (folder / limit).read_text().strip()
    if bound == "max":
        return
    statistics = _numbers(folder / "memory.stat")
    yield int(bound) - int((folder / used).read_text()) + statistics[droppable]


def _numbers(file: Path) -> dict[str, int]:
    return {name: int(value) for name, value in (line.split() for line in file.read_text().splitlines())}
