"""The memory that is left, as files of the kernel say it: under limits of groups, of the machine, of a process."""

import subprocess
import sys
from pathlib import Path

from kilobatch.trainer.costs import machine_memory

LIMITED = """
import resource
from kilobatch.trainer.costs.machine_memory import most_per_worker
size = 4 << 30
resource.setrlimit(resource.RLIMIT_AS, (size, size))
print(most_per_worker(1), most_per_worker(1_000_000))
"""


def test_limits_of_every_group_above_count(tmp_path: Path) -> None:
    """Both kinds of control groups. Files that the kernel may drop count as free; a limit "max" is none."""
    new, old = tmp_path / "job" / "step", tmp_path / "memory" / "job"
    for folder, limit, used, dropped, names in (
        (new, "max", 600, 100, ("memory.max", "memory.current", "inactive_file")),
        (new.parent, "1000", 700, 50, ("memory.max", "memory.current", "inactive_file")),
        (old, "3000", 900, 200, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{limit}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {dropped}\n")
    groups = tmp_path / "cgroup"
    groups.write_text("0::/job/step\n")
    assert list(machine_memory.free_of_groups(tmp_path, groups)) == [1000 - 700 + 50]
    groups.write_text("3:cpu,memory:/job\n2:cpuset:/\n")
    assert list(machine_memory.free_of_groups(tmp_path, groups)) == [3000 - 900 + 200]


def test_kills_are_counted_in_the_innermost_group_that_counts(tmp_path: Path) -> None:
    groups, kernel = tmp_path / "cgroup", tmp_path / "vmstat"
    kernel.write_text("nr_free_pages 12\noom_kill 7\n")
    groups.write_text("0::/job/step\n")
    assert machine_memory.kills_for_memory(tmp_path, groups, kernel) == 7
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    assert machine_memory.kills_for_memory(tmp_path, groups, kernel) == 2
    (tmp_path / "memory" / "job").mkdir(parents=True)
    (tmp_path / "memory" / "job" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
    groups.write_text("4:memory:/job\n0::/\n")
    assert machine_memory.kills_for_memory(tmp_path, groups, kernel) == 4


def test_what_a_process_holds() -> None:
    """A process of its own: this one may have memory left, of which a block takes no more."""
    script = "block = b'x' * (100 << 20); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin and process.stdout.readline() == b"held\n"
        held = machine_memory.held_by(process.pid)
        process.stdin.write(b"\n")
    assert held is not None and 100 << 20 < held < 150 << 20
    assert machine_memory.held_by(process.pid) is None


def test_a_limit_on_the_address_space_holds_for_each_worker() -> None:
    shared = machine_memory.most_per_worker(1)
    assert 2**20 < machine_memory.most_per_worker(2) <= shared
    printed = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True).stdout.split()
    assert 0 < int(printed[0]) < 1 << 30 and int(printed[1]) < shared / 1000
