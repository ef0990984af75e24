"""Runs a worker's main in this process, which takes a small part of the time of a new one."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist
from deepspeed.comm import comm
from deepspeed.utils import groups

from kilobatch.data import (
    numba_jit,  # noqa: F401  # before a test moves the cache, so that no loop is compiled anew
    triton_support,
)
from kilobatch.launch.processes.exit_status import INTERRUPTED, REFUSED, RunOutcome
from kilobatch.launch.worker import embedding, error_file
from kilobatch.launch.worker import main as worker

MAINS = {worker.__name__: worker.main, embedding.__name__: embedding.main}
KINDS = {0: "finished", INTERRUPTED: "interrupted", REFUSED: "refused"}


class _Left(BaseException):
    """A worker has left with an exit code and a message."""

    def __init__(self, message: str, code: int) -> None:
        self.message, self.code = message, code


def run_workers(
    folder: Path,
    workers: int,
    module: str,
    arguments: list[str],
    stall_minutes: float | None = None,
    question: object = None,
) -> RunOutcome:
    """Stands for launcher.run_workers with one worker; what it prints goes to this process's streams."""
    assert workers == 1
    code, lines = 0, []
    with restored():
        sys.argv = [module, *arguments]
        try:
            MAINS[module]()
        except SystemExit as end:
            code = int(end.code or 0)
        except _Left as left:
            code, lines = left.code, left.message.splitlines()
            print(left.message, file=sys.stderr)
    return RunOutcome(KINDS.get(code, "failed"), None if not code else 0, "here", f"exit code {code}", lines)  # pyright: ignore[reportArgumentType]


def _leave(message: str, code: int) -> NoReturn:
    raise _Left(message, code)


@contextmanager
def restored() -> Iterator[None]:
    """Puts back what a worker, or another program with an engine, changes of its process."""
    argv, exit_now, hook = sys.argv, error_file.exit_now, threading.excepthook
    handlers = {number: signal.getsignal(number) for number in worker.STOP_SIGNALS}
    environment, tells = dict(os.environ), [*triton_support.log.handlers]  # DeepSpeed sets LOCAL_RANK
    error_file.exit_now = _leave
    triton_support.use_kernels.cache_clear()  # each worker says once what its operations run as
    try:
        yield
    finally:
        sys.argv, error_file.exit_now, threading.excepthook = argv, exit_now, hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
        triton_support.log.handlers[:] = tells
        os.environ.clear()
        os.environ.update(environment)
        if dist.is_initialized():
            dist.destroy_process_group()
        # DeepSpeed keeps the group of all ranks, and would use it again after its end.
        groups._WORLD_GROUP = comm.cdb = None  # pyright: ignore[reportPrivateUsage]
