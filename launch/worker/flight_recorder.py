"""Dumps torch's flight recorder when the launcher asks for it: a worker's last collectives, begun and done.

A launcher that takes its workers to hang sends SIGUSR1, long before a collective times out. faulthandler then writes
the stacks (launch.processes.parent_death). On a GPU they show where the worker waits for its device; which collective
it waits in, only the recorder knows; the log gets a line about the last one.
"""

import faulthandler
import os
import pickle
import signal
import sys
import threading
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d  # pyright: ignore[reportAttributeAccessIssue]

from kilobatch.data.files import write_whole
from kilobatch.launch.processes.failure_files import DUMP_PREFIX

BACKENDS = ("gloo", "nccl", "nccl2")  # the recorders' names: each implementation has one of its own


def dump_on_request(rank: int) -> None:
    """Starts a thread that dumps this worker's recorder after a SIGUSR1, also while the main thread waits in C. Does
    nothing where no launcher has said where to."""
    prefix = next((os.environ[name] for name in DUMP_PREFIX if name in os.environ), None)
    if prefix is None:
        return
    requests, theirs = os.pipe()
    os.set_blocking(theirs, False)
    # Python's handlers run in the main thread, which hangs. But the signal's number is written to this pipe at once.
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    faulthandler.unregister(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, lambda number, frame: None)
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)
    arguments = requests, Path(f"{prefix}{rank}")
    threading.Thread(target=_serve, args=arguments, name="flight recorder", daemon=True).start()


def _serve(requests: int, path: Path) -> None:
    while numbers := os.read(requests, 64):
        if signal.SIGUSR1 in numbers:
            dump = _dump()
            print("\n".join(last_collectives(dump)), file=sys.stderr, flush=True)
            write_whole(path, [dump])


def last_collectives(dump: bytes) -> list[str]:
    """A line about the last collective of each process group in a dump: its number in the group, and whether this
    worker has done it."""
    last = {entry["process_group"]: entry for entry in pickle.loads(dump)["entries"]}
    return [
        f"kilobatch: last collective of {name or number}: number {entry['collective_seq_id']}, "
        f"{entry['profiling_name']} of {entry['input_sizes']}, {'done' if entry['retired'] else 'not done'}"
        for (number, name), entry in last.items()
    ]


def _dump() -> bytes:
    """The pickled records of the backend in use: those of the others are empty. Without stacks, whose names take ten
    seconds to look up; the log has those of the hang."""
    dumps = [_distributed_c10d._dump_fr_trace(includeStackTraces=False, backend=name) for name in BACKENDS]
    if dist.is_nccl_available():
        dumps.append(_distributed_c10d._dump_nccl_trace(includeStackTraces=False))  # pyright: ignore[reportAttributeAccessIssue]
    return max(dumps, key=len)
