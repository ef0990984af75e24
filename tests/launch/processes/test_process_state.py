"""Processes as /proc shows them: real ones that are stopped, wait or have ended, and recorded files."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kilobatch.launch.processes.process_state import (
    ThreadState,
    describe_process,
    describe_threads,
    thread_states,
)
from tests.helpers.scripted_runs import until

NFS = """[<0>] rpc_wait_bit_killable+0x11/0x70 [sunrpc]
[<0>] nfs4_proc_getattr+0x69/0x100 [nfsv4]
[<0>] vfs_statx+0xb1/0x160
"""


@pytest.fixture
def sleeping() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def write(proc: Path, tid: int, name: str, state: str, wchan: str = "0", stack: str | None = None) -> None:
    """Files as the kernel shows them for a thread of process 7; without `stack`, as to a user that is not root."""
    task = proc / "7" / "task" / str(tid)
    task.mkdir(parents=True)
    (task / "stat").write_bytes(
        f"{tid} (".encode() + os.fsencode(name) + f") {state} 1 7 7 0 -1 4194560 1037\n".encode()
    )
    (task / "wchan").write_text(wchan)
    if stack is not None:
        (task / "stack").write_text(stack)


def test_a_stopped_process(sleeping: subprocess.Popen[bytes]):
    """The kernel may take its time to begin or stop a process, on a machine that has other work."""
    until(lambda: describe_process(thread_states(sleeping.pid)).startswith("sleeping (state S"))
    sleeping.send_signal(signal.SIGSTOP)
    until(lambda: describe_process(thread_states(sleeping.pid)) == "stopped (state T)")


def test_a_process_that_has_ended(sleeping: subprocess.Popen[bytes]):
    sleeping.kill()
    os.waitid(os.P_PID, sleeping.pid, os.WEXITED | os.WNOWAIT)
    assert describe_process(thread_states(sleeping.pid)) == "ended (state Z)"
    sleeping.wait()
    assert thread_states(sleeping.pid) == []
    assert describe_process([]) == ""


def test_a_main_thread_that_waits_for_a_file_server(tmp_path: Path):
    write(tmp_path, 9, "pt_autograd_0", "S", "futex_do_wait", "[<0>] futex_do_wait+0x1/0x2\n")
    write(tmp_path, 8, "pt_autograd_1", "S", "futex_do_wait", "[<0>] futex_do_wait+0x1/0x2\n")
    write(tmp_path, 7, "python (3) \udcff", "D", "rpc_wait_bit_killable", NFS)
    threads = thread_states(7, tmp_path)
    assert [thread.name for thread in threads] == ["python (3) \ufffd", "pt_autograd_1", "pt_autograd_0"]
    assert describe_process(threads) == "stuck in the kernel (state D, waits in rpc_wait_bit_killable)"
    assert describe_threads(threads) == [
        "thread python (3) \ufffd: stuck in the kernel (state D, waits in rpc_wait_bit_killable)",
        "  rpc_wait_bit_killable",
        "  nfs4_proc_getattr",
        "  vfs_statx",
        "thread pt_autograd_1 and 1 more: sleeping (state S, waits in futex_do_wait)",
        "  futex_do_wait",
    ]


def test_another_thread_that_is_stuck_is_named(tmp_path: Path):
    write(tmp_path, 7, "python", "S", "futex_do_wait")
    write(tmp_path, 8, "idle", "S")
    write(tmp_path, 9, "checkpoint 40", "D")
    threads = thread_states(7, tmp_path)
    assert threads[2] == ThreadState("checkpoint 40", "D", "")
    assert describe_process(threads) == (
        "sleeping (state S, waits in futex_do_wait), its thread checkpoint 40 is stuck in the kernel (state D)"
    )
    assert describe_threads(threads)[1] == "thread checkpoint 40: stuck in the kernel (state D)"
