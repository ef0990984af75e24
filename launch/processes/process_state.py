"""Reads from /proc why a process does not answer: whether it is stopped, or where in the kernel it is stuck."""

from dataclasses import dataclass
from pathlib import Path

_STATES = {"R": "running", "S": "sleeping", "I": "idle", "Z": "ended"}


@dataclass(frozen=True)
class ThreadState:
    """A thread. state: the letter in /proc/PID/task/TID/stat; waits_in: the kernel's function in which it waits, "" if
    that is not known; stack: the kernel's calls, innermost first, where the kernel lets us read them (for root)."""

    name: str
    state: str
    waits_in: str
    stack: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f", waits in {self.waits_in}" if self.waits_in else ""
        match self.state:
            case "T" | "t":
                return f"stopped (state {self.state})"
            case "D":
                return f"stuck in the kernel (state D{where})"
            case _:
                return f"{_STATES.get(self.state, 'not running')} (state {self.state}{where})"


def thread_states(pid: int, proc: Path = Path("/proc")) -> list[ThreadState]:
    """The threads of a process, the main thread first; none where the process has ended."""
    try:
        tasks = sorted((proc / str(pid) / "task").iterdir(), key=lambda task: (task.name != str(pid), int(task.name)))
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [state for task in tasks if (state := _thread_state(task))]


def describe_process(threads: list[ThreadState]) -> str:
    """What keeps the process: its main thread's state, or that of another thread which is stuck; "" for no threads."""
    if not threads:
        return ""
    main = threads[0]
    stuck = next((thread for thread in threads if thread.state == "D"), None)
    if main.state in "TtD" or stuck is None:
        return str(main)
    return f"{main}, its thread {stuck.name} is {stuck}"


def describe_threads(threads: list[ThreadState]) -> list[str]:
    """Lines about the threads, the stuck ones after the main thread; those that wait at the same place are counted."""
    lines: list[str] = []
    others = sorted(threads[1:], key=lambda thread: thread.state != "D")
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for thread in [*threads[:1], *others]:
        groups.setdefault((str(thread), thread.stack), []).append(thread.name)
    for (state, stack), names in groups.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines += [f"thread {names[0]}{more}: {state}", *(f"  {call}" for call in stack)]
    return lines


def _thread_state(task: Path) -> ThreadState | None:
    """None where the thread has ended."""
    try:
        name, _, rest = (task / "stat").read_text(errors="replace").partition("(")[2].rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return None
    waits_in = _readable(task / "wchan").strip()
    stack = tuple(line.partition("] ")[2].partition("+")[0] for line in _readable(task / "stack").splitlines())
    return ThreadState(name, rest.split()[0], "" if waits_in == "0" else waits_in, tuple(filter(None, stack)))


def _readable(path: Path) -> str:
    """The file's text; "" where the kernel does not let us read it, or has no such file."""
    try:
        return path.read_text()
    except OSError:
        return ""
