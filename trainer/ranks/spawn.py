"""Runs a function on real process groups on this machine: for `kilobatch verify`, and for the tests."""

import multiprocessing
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from kilobatch.trainer.ranks.skip_dynamo import skip_dynamo

# Modules that the process from which all ranks are forked imports once. They may not read the environment, since each
# rank gets its caller's only later, nor ask for a GPU, which a forked process cannot use afterwards. So neither Triton
# nor DeepSpeed may be among them.
PRELOAD = [
    "torch.distributed",
    "kilobatch.trainer.checkpoint.writer",
    "kilobatch.trainer.engine",
    "kilobatch.trainer.optim.optimizers",
]


def run_ranks(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 90.0) -> list[Any]:
    """Runs fn(*args) in `world` processes that share one gloo group; returns every rank's result, in rank order.

    fn is a function at the top level of a module; args and results are pickled. Each process has one torch thread. The
    group is initialised through a file of its own, so that calls at the same time cannot collide.
    Raises ProcessRaisedException with the traceback of a rank that raised, ProcessExitedException for one that died,
    TimeoutError after `timeout` seconds; no process outlives the call.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)
    _start_fork_server()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        arguments = (world, folder, timeout, dict(os.environ), pickle.dumps((fn, args)))
        context = start_processes(_run, arguments, world, join=False, start_method="forkserver")
        assert context is not None
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=1.0):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{fn.__name__} on {world} ranks is not done after {timeout} s")
        finally:
            for process in context.processes:
                assert process is not None
                process.kill()
                process.join()
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world)]


def _start_fork_server() -> None:
    """Starts the process from which ranks are forked, unless it runs. It is the variable's only reader: without it,
    Python would take a random.py in the caller's folder for its own module."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONSAFEPATH"]
        if before is not None:
            os.environ["PYTHONSAFEPATH"] = before


def _run(
    rank: int,
    world: int,
    folder: str,
    timeout: float,
    environment: Mapping[str, str],
    pickled: bytes,
) -> None:
    threading.Thread(target=_exit_with_caller, daemon=True).start()
    os.environ.clear()
    os.environ |= environment
    skip_dynamo()
    fn, args = pickle.loads(pickled)  # imports fn's module, so not before the environment is the caller's
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    try:
        torch.save(fn(*args), Path(folder, f"{rank}.pt"))
    finally:
        dist.destroy_process_group()


def _exit_with_caller() -> None:
    """Ends this rank when the process that called run_ranks ends.

    The operating system's parent of a rank is the fork server, which outlives a caller that is killed.
    """
    caller = multiprocessing.parent_process()
    assert caller is not None
    wait([caller.sentinel])
    os._exit(1)
