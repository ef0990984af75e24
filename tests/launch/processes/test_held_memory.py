"""The words about a worker that has ended: for want of memory where there is evidence of that, and not elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kilobatch.launch.processes import held_memory
from kilobatch.launch.processes.events import WorkerFailed, from_line, run_outcome, to_line
from kilobatch.launch.processes.held_memory import HeldMemory
from tests.helpers.memory_group import memory_group
from tests.helpers.programs import PROGRAMS

LAUNCH = """
import os, sys
from pathlib import Path
if len(sys.argv) > 3:
    Path(sys.argv[3]).write_text(str(os.getpid()))
from kilobatch.launch.processes.launcher import run_workers
outcome = run_workers(Path(sys.argv[2]), 1, "scripted_memory", [sys.argv[1], sys.argv[2]])
print(outcome.kind, outcome.short_of_memory, outcome.how, sep="|")
"""
ON_GPU = (
    "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
    "79.14 GiB of which 1.19 GiB is free. Including non-PyTorch memory, this process has 77.94 GiB memory in use. Of "
    "the allocated memory 76.02 GiB is allocated by PyTorch"
)
ON_CPU = (
    "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried "
    "to allocate 9663676416 bytes. Error code 12 (Cannot allocate memory)"
)


def launched(what: str, folder: Path, *group: str) -> list[str]:
    """Kind, whether it was for want of memory, and how, of a worker of a launcher of its own."""
    (folder / "logs").mkdir()
    environment = os.environ | {"PYTHONPATH": f"{PROGRAMS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", LAUNCH, what, str(folder), *group]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split("|")


def test_the_kernels_kill_is_told_with_what_the_worker_held(tmp_path: Path) -> None:
    with memory_group(2 << 30) as group:  # the kernel takes the largest process, which is then not the launcher
        kind, short, how = launched("grows", tmp_path, str(group / "cgroup.procs"))
    assert (kind, short) == ("failed", "True")
    match = re.fullmatch(r"killed by the kernel for want of memory; it held ([\d.]+) GiB", how)
    assert match and 1 <= float(match[1]) <= 2, how


def test_someones_kill_is_not_taken_for_the_kernels(tmp_path: Path) -> None:
    kind, short, how = launched("is killed", tmp_path)
    assert (kind, short) == ("failed", "False") and how.startswith("ended by SIGKILL (by someone, or by the kernel")


def test_memory_that_was_asked_for_in_vain_is_told(tmp_path: Path) -> None:
    kind, short, how = launched("asks in vain", tmp_path)
    assert (kind, short) == ("failed", "True") and re.fullmatch(r"out of memory; it held [\d.]+ MiB", how)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["Traceback (most recent call last):", ON_GPU], "out of memory; it held 77.94 GiB of its GPU"),
        (["Traceback (most recent call last):", ON_CPU, ""], "out of memory; it held 3.0 GiB"),
        (["numpy._core._exceptions._ArrayMemoryError: Unable to allocate 23.0 GiB"], "out of memory; it held 3.0 GiB"),
        (["terminate called after throwing an instance of 'std::bad_alloc'"], "out of memory; it held 3.0 GiB"),
        ([ON_CPU, "During handling of this, another exception occurred:", "ValueError: no"], ""),
        (["kilobatch: MemoryError is only named here"], ""),
        ([ON_GPU] + 30 * ["a step"], ""),
        ([], ""),
    ],
)
def test_the_last_error_counts(monkeypatch: pytest.MonkeyPatch, lines: list[str], expected: str) -> None:
    monkeypatch.setattr(held_memory.machine_memory, "held_by", lambda process: 3 << 30)
    seen = HeldMemory()
    seen.look([7])
    assert seen.describe_end(7, 1, lines) == expected


def test_a_kill_while_the_machines_memory_was_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count is not to be had, as in some containers. Then it is told what was seen, not who killed."""
    free = iter([20 << 30, 100 << 20, 20 << 30])  # at the start, at its worst, and once the worker's is taken back
    monkeypatch.setattr(held_memory.machine_memory, "free_of_machine", lambda: next(free))
    monkeypatch.setattr(held_memory.machine_memory, "held_by", lambda process: 22 << 30)
    seen = HeldMemory()
    seen.look([7])
    seen.look([7])
    assert seen.describe_end(7, -9, []) == "ended by SIGKILL, when 100.0 MiB of memory were left here; it held 22.0 GiB"


def test_a_count_before_the_window_is_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now, kills = [0.0], [0]
    monkeypatch.setattr(held_memory.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(held_memory.machine_memory, "kills_for_memory", lambda: kills[0])
    seen = HeldMemory()
    kills[0] = 1
    assert seen.describe_end(7, -9, []) == "killed by the kernel for want of memory"
    for second in range(40):
        now[0] = second
        seen.look([])
    assert seen.describe_end(7, -9, []) == ""


def test_the_outcome_says_so_on_every_node() -> None:
    failed = WorkerFailed(3, "n1", -9, [], memory="killed by the kernel for want of memory; it held 9.0 GiB")
    outcome = run_outcome([from_line(to_line(failed))])
    assert (outcome.rank, outcome.how, outcome.short_of_memory) == (3, failed.memory, True)
    assert not run_outcome([WorkerFailed(3, "n1", -9, [])]).short_of_memory
