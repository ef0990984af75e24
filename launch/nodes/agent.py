"""Runs one node's part of a run on several machines. The agent starts the node's workers as `kilobatch train` does on
one machine, is told of failures and stops on the other nodes, and ends together with them."""

import os
import socket
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.launch.nodes import rendezvous
from kilobatch.launch.nodes.connections import HubConnection, is_loopback
from kilobatch.launch.processes.events import AgentLost, AllJoined, StopRequested, WorkerFailed
from kilobatch.launch.processes.exit_status import REFUSED, RunOutcome, this_host
from kilobatch.launch.processes.launcher import serve_store, store_file
from kilobatch.launch.processes.supervisor import EventLog, LocalEventLog, MemoryQuestion, Supervisor
from kilobatch.launch.processes.worker_processes import WorkerGroup, start_workers
from kilobatch.launch.worker.ports import listen

OPEN_SECONDS = 1200.0  # for node 0 to open the meeting: it may have to wait for an attempt that was taken for dead
JOIN_SECONDS = 600.0  # for the agents of the other nodes to join
GATHER_SECONDS = 2.0  # after a failure, to hear of failures of other workers: the first one may be reported later


def run_node(
    folder: Path,
    node: int,
    nodes: int,
    workers: int,
    meeting: str,
    arguments: list[str],
    *,
    interface: str | None = None,
    stop_requested: Callable[[], str | None],
    stall_minutes: float | None,
    prepare: Callable[[], list[str]] = list,
    question: MemoryQuestion | None = None,
    module: str = "kilobatch.launch.worker.main",
) -> RunOutcome:
    """Runs `python -m <module> <arguments>` in `workers` processes on this node, together with those of the other
    nodes, and waits for all of them. Returns the same outcome on every node.

    meeting: a name that only this attempt has, such as "<job id>-<restart count>"; interface: the network interface for
    gloo and NCCL; stop_requested: returns the signal by which this process was asked to stop, None before one has come;
    prepare: called on node 0 before any worker starts, while the other nodes wait. It returns further arguments for
    the workers of node 0; a UserError that it raises is the outcome. question: of node 0, where the answer is about all
    nodes.
    """
    agent = _Agent(
        folder, node, nodes, workers, interface, stop_requested, stall_minutes, [module, *arguments], question
    )
    if node > 0:
        return agent.run_other_node(meeting)
    return agent.run_node_0(meeting, prepare)


@dataclass
class _Agent:
    """The arguments of `run`; command: the module and its arguments."""

    folder: Path
    node: int
    nodes: int
    workers: int
    interface: str | None
    stop_requested: Callable[[], str | None]
    stall_minutes: float | None
    command: list[str]
    question: MemoryQuestion | None

    def run_node_0(self, meeting: str, prepare: Callable[[], list[str]]) -> RunOutcome:
        """Opens the meeting, waits for the other agents, runs this node's workers, and decides on the run's outcome."""
        with listen(meeting) as listening:
            return self._run_node_0(meeting, prepare, listening)

    def _run_node_0(self, meeting: str, prepare: Callable[[], list[str]], listening: socket.socket) -> RunOutcome:
        port = listening.getsockname()[1]
        if self.nodes == 1:
            supervisor = self._supervisor(LocalEventLog())
            self._check_and_prepare(supervisor, prepare)
            supervisor.wait()  # a stop that was requested meanwhile has to come before AllJoined
            supervisor.event_log.post(AllJoined(address=""))
            return self._run(supervisor, "127.0.0.1", port, "127.0.0.1", listening)
        hub = rendezvous.open_hub(self.folder, meeting, self.interface, port)
        try:
            with closing(hub):
                supervisor = self._supervisor(hub)
                self._check_and_prepare(supervisor, prepare)
                self._wait_for_agents(supervisor, hub)
                outcome = self._run(supervisor, "127.0.0.1", port, hub.address, listening)
        finally:
            rendezvous.remove_file(self.folder, meeting)
        if len(supervisor.joined_nodes()) < self.nodes:
            rendezvous.leave_outcome(self.folder, meeting, outcome)
        return outcome

    def _wait_for_agents(self, supervisor: Supervisor, hub: HubConnection) -> None:
        """Waits until all agents have joined, or something ends the run first."""
        deadline = time.monotonic() + JOIN_SECONDS
        while not supervisor.ended_before_start() and len(supervisor.joined_nodes()) < self.nodes:
            if time.monotonic() > deadline:
                how = f"its agent did not come within {JOIN_SECONDS / 60:g} minutes"
                for node in sorted(set(range(self.nodes)) - supervisor.joined_nodes()):
                    hub.post(AgentLost(node, f"node {node}", how))
                return
            supervisor.wait()
        hub.post(AllJoined(hub.address))

    def run_other_node(self, meeting: str) -> RunOutcome:
        """Waits until node 0 has opened the meeting, joins it, and runs this node's workers."""
        deadline = time.monotonic() + OPEN_SECONDS
        while (joined := rendezvous.join(self.folder, meeting, self.node, this_host())) is None:
            if by := self.stop_requested():
                return RunOutcome("interrupted", how=f"{by} on {this_host()}")
            if time.monotonic() > deadline:
                return RunOutcome(
                    "lost", None, "node 0", f"its agent did not open the meeting within {OPEN_SECONDS / 60:g} minutes"
                )
            time.sleep(0.5)
        if isinstance(joined, RunOutcome):
            return joined
        connection, port = joined
        with closing(connection):
            supervisor = self._supervisor(connection)
            self._check_and_prepare(supervisor, list)
            return self._run(supervisor, connection.remote, port, connection.local)

    def _supervisor(self, events: EventLog) -> Supervisor:
        def stop() -> StopRequested | None:
            return StopRequested(1, f"{by} on {this_host()}") if (by := self.stop_requested()) else None

        gather = GATHER_SECONDS if self.nodes > 1 else 0.1 * GATHER_SECONDS
        return Supervisor(events, self.node, stop, self.stall_minutes, gather, self.question)

    def _check_and_prepare(self, supervisor: Supervisor, prepare: Callable[[], list[str]]) -> None:
        """Adds to the workers' arguments. Posts a UserError of either as a failure of this node, which ends the run
        before any worker starts."""
        try:
            if self.interface:
                rendezvous.check_interface(self.interface)
            self.command += prepare()
        except UserError as error:
            supervisor.event_log.post(WorkerFailed(None, this_host(), REFUSED, f"kilobatch: {error}".splitlines()))

    def _run(
        self, supervisor: Supervisor, address: str, port: int, local: str, listening: socket.socket | None = None
    ) -> RunOutcome:
        """Starts the workers once all agents have joined, and supervises them to their end.

        address, port: of the store; local: this machine's address on the network to the other nodes; listening: on
        node 0, the socket to serve the store on.
        """
        while (joined := supervisor.all_joined()) is None and not supervisor.ended_before_start():
            supervisor.wait()
        if joined is None:
            return supervisor.conclude(True, [])
        environment = _interface_variables(self.interface, joined.address, local)
        with store_file(alone=self.nodes == 1) as store:
            first, world = self.node * self.workers, self.nodes * self.workers
            group = WorkerGroup(first, world, address, port, environment | store)
            with start_workers(self.folder, self.workers, group, self.command) as run, serve_store(listening, group):
                return supervisor.run(run)


def _interface_variables(interface: str | None, node_0: str, local: str) -> dict[str, str]:
    """Environment variables with the network interface for gloo and NCCL. By default gloo takes the interface of the
    machine's name, which other machines may not reach; NCCL finds a fast one itself.

    node_0: its address for other machines, empty where there are none; local: this machine's on the way to node 0.
    """
    if interface:
        return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    if not node_0:
        return {"GLOO_SOCKET_IFNAME": "lo"}
    return {"GLOO_SOCKET_IFNAME": rendezvous.interface_of(node_0 if is_loopback(local) else local)}
