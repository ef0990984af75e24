"""A node's part of a run on several machines. Its agent starts the node's workers as `train` does on one machine,
learns of the other nodes' failures and stops, and ends with them."""

import os
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from kilobatch.data.errors import Refusal
from kilobatch.launch.nodes import rendezvous as meetings
from kilobatch.launch.nodes.connections import Hub, is_loopback
from kilobatch.launch.processes.events import Failed, Lost, Stop, Together
from kilobatch.launch.processes.exit_status import REFUSED, Ending, this_host
from kilobatch.launch.processes.supervisor import Alone, Board, Watch
from kilobatch.launch.processes.worker_processes import Place, started

OPEN = 1200.0  # seconds for node 0 to open the meeting: it may have to wait for an attempt that was taken for dead
COME = 600.0  # seconds for the other nodes to come
GATHER = 2.0  # seconds for the failures of other workers to be told, so that the first is found


def run(
    folder: Path,
    node: int,
    nodes: int,
    workers: int,
    meeting: str,
    arguments: list[str],
    *,
    interface: str | None = None,
    asked: Callable[[], str | None],
    stall_minutes: float | None,
    prepare: Callable[[], None] = lambda: None,
    module: str = "kilobatch.launch.worker.main",
) -> Ending:
    """Runs `python -m <module> <arguments>` in `workers` processes on this node, together with those of the other
    nodes, and waits for them all. Returns the same on every node.

    meeting: a name of this attempt's own, such as "<job id>-<restart count>"; interface: the network's, for gloo and
    NCCL; asked: the signal by which this process was asked to stop; prepare: what node 0 does before any worker starts,
    while the others wait: a Refusal that it raises is the ending.
    """

    part = _Part(folder, node, nodes, workers, interface, asked, stall_minutes, [module, *arguments])
    if node > 0:
        return part.attend(meeting)
    return part.host(meeting, prepare)


@dataclass
class _Part:
    """A node's, as `run` is told of it."""

    folder: Path
    node: int
    nodes: int
    workers: int
    interface: str | None
    asked: Callable[[], str | None]
    stall_minutes: float | None
    command: list[str]

    def host(self, meeting: str, prepare: Callable[[], None]) -> Ending:
        """Node 0: opens the meeting, calls the roll, and has the last word."""
        store = meetings.open_store(meeting)
        if self.nodes == 1:
            watch = self._watch(Alone())
            self._try(watch, prepare)
            watch.wait()  # a stop that was asked meanwhile comes first
            watch.board.post(Together(outward=""))
            return self._run(watch, "127.0.0.1", store.port, "127.0.0.1")
        hub = meetings.host(self.folder, meeting, self.interface, store.port)
        try:
            with closing(hub):
                watch = self._watch(hub)
                self._try(watch, prepare)
                self._call_roll(watch, hub)
                return self._run(watch, "127.0.0.1", store.port, hub.outward)
        finally:
            meetings.leave(self.folder, meeting)

    def _call_roll(self, watch: Watch, hub: Hub) -> None:
        """Until all agents have come, or something ends the run first."""
        until = time.monotonic() + COME
        while not watch.over_before_it_began() and len(watch.come()) < self.nodes:
            if time.monotonic() > until:
                for node in sorted(set(range(self.nodes)) - watch.come()):
                    hub.post(Lost(node, f"node {node}", f"its agent did not come within {COME / 60:g} minutes"))
                return
            watch.wait()
        hub.post(Together(hub.outward))

    def attend(self, meeting: str) -> Ending:
        """Another node: waits for node 0 to open the meeting."""
        until = time.monotonic() + OPEN
        while (found := meetings.attend(self.folder, meeting, self.node, this_host())) is None:
            if by := self.asked():
                return Ending("interrupted", how=f"{by} on {this_host()}")
            if time.monotonic() > until:
                return Ending(
                    "lost", None, "node 0", f"its agent did not open the meeting within {OPEN / 60:g} minutes"
                )
            time.sleep(0.5)
        spoke, port = found
        with closing(spoke):
            watch = self._watch(spoke)
            self._try(watch, lambda: None)
            return self._run(watch, spoke.remote, port, spoke.local)

    def _watch(self, board: Board) -> Watch:
        def stop() -> Stop | None:
            return Stop(1, f"{by} on {this_host()}") if (by := self.asked()) else None

        return Watch(board, self.node, stop, self.stall_minutes, GATHER if self.nodes > 1 else 0.1 * GATHER)

    def _try(self, watch: Watch, prepare: Callable[[], None]) -> None:
        try:
            if self.interface:
                meetings.check_interface(self.interface)
            prepare()
        except Refusal as refusal:
            watch.board.post(Failed(None, this_host(), REFUSED, f"kilobatch: {refusal}".splitlines()))

    def _run(self, watch: Watch, address: str, port: int, local: str) -> Ending:
        """address, port: of the store; local: our address on the way to the other nodes."""
        while (met := watch.met()) is None and not watch.over_before_it_began():
            watch.wait()
        if met is None:
            return watch.conclude(True, [])
        environment = _sockets(self.interface, met.outward, local)
        place = Place(self.node * self.workers, self.nodes * self.workers, address, port, environment)
        with started(self.folder, self.workers, place, self.command) as workers:
            return watch.run(workers)


def _sockets(interface: str | None, outward: str, local: str) -> dict[str, str]:
    """Which network interface gloo and NCCL take. Left alone, gloo takes that of the machine's name, which may lead
    nowhere; NCCL looks for a fast one itself."""
    if interface:
        return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return {}
    if not outward:
        return {"GLOO_SOCKET_IFNAME": "lo"}
    return {"GLOO_SOCKET_IFNAME": meetings.interface_of(outward if is_loopback(local) else local)}
