"""Runs a node's agent as a process of its own, as a job does, which stops at SIGTERM and SIGUSR2."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.launch.nodes import agent, connections
from kilobatch.launch.processes import supervisor
from tests.helpers.process_groups import PRELOAD
from tests.helpers.programs import PROGRAMS

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOAD)  # so that the modules are imported once, not by each process


def main(
    outcomes: Connection,
    folder: Path,
    node: int,
    nodes: int,
    workers: int,
    stall: float,
    module: str,
    arguments: list[str],
) -> None:
    os.environ |= {"SLURMD_NODENAME": f"n{node}", "PYTHONPATH": str(PROGRAMS), "OMP_NUM_THREADS": "1"}
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    supervisor.GRACE = 0.5
    connections.LOST_SECONDS = 5.0
    received: list[str] = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: received.append(signal.Signals(number).name))

    def prepare() -> list[str]:
        if "unprepared" in arguments:
            raise UserError("no images there")
        return ["of node 0"] if module == "scripted_worker" else []

    outcome = agent.run_node(
        folder,
        node,
        nodes,
        workers,
        "7-0",
        arguments,
        stop_requested=lambda: received[0] if received else None,
        stall_minutes=stall,
        prepare=prepare,
        module=module,
    )
    outcomes.send(outcome)
