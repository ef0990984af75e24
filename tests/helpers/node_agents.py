"""A node's agent as a process of its own, as a job has one. Takes SIGTERM and SIGUSR2 as a job does."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from kilobatch.data.errors import Refusal
from kilobatch.launch.nodes import agent
from kilobatch.launch.nodes import connections as peers
from kilobatch.launch.processes import supervisor as watch
from tests.helpers.process_groups import PRELOAD
from tests.helpers.programs import PROGRAMS

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOAD)  # imported once, not by each process


def main(
    said: Connection, folder: Path, node: int, nodes: int, workers: int, stall: float, module: str, arguments: list[str]
) -> None:
    os.environ |= {"SLURMD_NODENAME": f"n{node}", "PYTHONPATH": str(PROGRAMS), "OMP_NUM_THREADS": "1"}
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    watch.GRACE = 0.5
    peers.LOST = 5.0
    asked: list[str] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda received, frame: asked.append(signal.Signals(received).name))

    def prepare() -> None:
        if "unprepared" in arguments:
            raise Refusal("no images there")

    ending = agent.run(
        folder,
        node,
        nodes,
        workers,
        "7-0",
        arguments,
        asked=lambda: asked[0] if asked else None,
        stall_minutes=stall,
        prepare=prepare,
        module=module,
    )
    said.send(ending)
