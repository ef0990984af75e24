"""TCP connections over which the agents of a run share events. Each agent sends its events to node 0, which passes all
events on to all agents, in one order.

An event is a line; an empty line is a heartbeat. The end of an agent closes its connection, which the others notice at
once; the loss of its machine is noticed when heartbeats stop. A thread sends and receives, so that heartbeats go on
while a slow disk holds up the writing of logs.
"""

import json
import os
import selectors
import socket
import threading
import time
from collections import deque

from kilobatch.launch.processes.events import AgentJoined, AgentLost, Event, RunEnded, from_line, to_line
from kilobatch.launch.processes.stall_timer import StallTimer

HEARTBEAT_SECONDS = 2.0  # between two heartbeats
LOST_SECONDS = 20.0  # without any message, after which an agent is taken for dead
CLOSE_SECONDS = 10.0  # for which node 0 keeps its connections at the end, so that the others can read the outcome


class Connection:
    """A connection to another agent. node, host: of that agent; -1 and "" while not known."""

    def __init__(self, channel: socket.socket) -> None:
        self.node, self.host = -1, ""
        self.since_message = StallTimer()
        self._channel, self._partial = channel, b""
        channel.settimeout(5.0)  # sending blocks where the other side does not read

    def fileno(self) -> int:
        return self._channel.fileno()

    @property
    def local(self) -> str:
        """This machine's address on the network to the other agent."""
        return _plain(self._channel.getsockname()[0])

    @property
    def remote(self) -> str:
        return _plain(self._channel.getpeername()[0])

    def send(self, data: bytes) -> None:
        """Sends data. A failure is not raised: the next `receive` notices it, as the end of the connection."""
        try:
            self._channel.sendall(data)
        except OSError:
            self.shut_down()

    def receive_exactly(self, length: int) -> bytes:
        """The next `length` bytes; fewer where no more come in time."""
        data = b""
        try:
            while len(data) < length and (more := self._channel.recv(length - len(data))):
                data += more
        except OSError:
            return data
        return data

    def receive(self) -> list[bytes] | None:
        """The complete lines that have come, without heartbeats; None at the connection's end. Blocks until there is
        something to read."""
        try:
            data = self._channel.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        self.since_message.reset()
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [line for line in lines if line]

    def shut_down(self) -> None:
        try:
            self._channel.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is closed already
            return

    def close(self) -> None:
        self._channel.close()


class _ConnectionThread:
    """The common part of both ends: a thread, and queues of events that it has received and that it has to send."""

    def __init__(self) -> None:
        self._received: deque[Event] = deque()
        self._to_send: deque[Event] = deque()
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()  # a byte in it wakes the thread
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._closing = False
        self._error: BaseException | None = None
        self._last_heartbeat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    def post(self, event: Event) -> None:
        self._to_send.append(event)
        os.write(self._wake_write, b".")

    def read(self) -> list[Event]:
        if self._error is not None:
            raise self._error
        return [self._received.popleft() for _ in range(len(self._received))]

    def close(self) -> None:
        self._closing = True
        os.write(self._wake_write, b".")
        self._thread.join()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(self) -> None:
        try:
            self._exchange()
        except BaseException as error:  # `read` raises it again, in the thread that uses this connection
            self._error = error

    def _exchange(self) -> None:
        """The thread: sends and receives events until the connection is closed."""
        raise NotImplementedError

    def _ready(self) -> list[selectors.SelectorKey]:
        """Connections from which something can be read, after at most 0.5 s."""
        keys = [key for key, _ in self._selector.select(0.5)]
        if any(key.fileobj == self._wake_read for key in keys):
            os.read(self._wake_read, 1 << 16)
        return [key for key in keys if key.fileobj != self._wake_read]

    def _send_heartbeats(self, connections: list[Connection]) -> None:
        if time.monotonic() - self._last_heartbeat >= HEARTBEAT_SECONDS:
            self._last_heartbeat = time.monotonic()
            for connection in connections:
                connection.send(b"\n")


class HubConnection(_ConnectionThread):
    """Node 0's end of the connections to all other agents. It accepts those that send the token first.

    address: of this machine, for other machines; "" while all agents that have joined are on this machine.
    """

    def __init__(self, listening: socket.socket, token: str) -> None:
        super().__init__()
        self.address = ""
        self._listening, self._token = listening, token
        self._connections: list[Connection] = []
        self._history = b""  # all events so far, for agents that join later
        self._ended = False
        self._joined: set[int] = {0}
        self._selector.register(listening, selectors.EVENT_READ, None)
        self._thread.start()

    def close(self) -> None:
        super().close()
        self._listening.close()

    def _exchange(self) -> None:
        deadline = None
        while True:
            for key in self._ready():
                if key.fileobj is self._listening:
                    self._accept()
                else:
                    self._receive(key.data)
            while self._to_send:
                self._publish(self._to_send.popleft())
            self._send_heartbeats(self._connections)
            for connection in list(self._connections):
                if connection.since_message.seconds() > LOST_SECONDS:
                    self._drop(connection, f"silent for {LOST_SECONDS:.0f} seconds")
            if self._closing:
                deadline = deadline or time.monotonic() + (CLOSE_SECONDS if self._ended else 0.0)
                if not any(connection.node >= 0 for connection in self._connections) or time.monotonic() > deadline:
                    break
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        channel, _ = self._listening.accept()
        connection = Connection(channel)
        self._connections.append(connection)
        self._selector.register(connection, selectors.EVENT_READ, connection)

    def _receive(self, connection: Connection) -> None:
        lines = connection.receive()
        if lines is None:
            self._drop(connection, "its agent has ended")
            return
        for line in lines:
            if connection.node >= 0:
                self._publish(from_line(line))
            elif not self._admit(connection, line):
                self._drop(connection, "not an agent of this run")
                return

    def _admit(self, connection: Connection, line: bytes) -> bool:
        """Reads the first line of a connection, and sends the agent all events so far. Returns False where the line is
        not that of an agent of this run."""
        try:
            token, node, host = json.loads(line)
        except (ValueError, TypeError):
            return False
        if token != self._token or node in self._joined:
            return False
        connection.node, connection.host = node, host
        connection.send(self._token.encode() + b"\n" + self._history)
        if not is_loopback(connection.remote):
            self.address = self.address or connection.local
        self._joined.add(node)
        self._publish(AgentJoined(node, host))
        return True

    def _publish(self, event: Event) -> None:
        """Sends an event to all agents, this one included."""
        line = to_line(event)
        self._history += line
        self._received.append(event)
        self._ended = self._ended or isinstance(event, RunEnded)
        for connection in self._connections:
            if connection.node >= 0:
                connection.send(line)

    def _drop(self, connection: Connection, how: str) -> None:
        """Closes a connection, and publishes that its agent is lost, unless the run has ended."""
        self._selector.unregister(connection)
        self._connections.remove(connection)
        connection.close()
        if connection.node >= 0 and not self._ended:
            self._publish(AgentLost(connection.node, connection.host, how))


class NodeConnection(_ConnectionThread):
    """Another node's end of its connection to node 0. local, remote: the addresses of this machine and of node 0."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._ended = False
        self.local, self.remote = connection.local, connection.remote
        self._selector.register(connection, selectors.EVENT_READ)
        self._thread.start()

    def _exchange(self) -> None:
        lost = ""
        while not self._closing and not lost:
            if self._ready():
                lines = self._connection.receive()
                if lines is None:
                    lost = "its agent has ended"
                for line in lines or []:
                    event = from_line(line)
                    self._ended = self._ended or isinstance(event, RunEnded)
                    self._received.append(event)
            while self._to_send:
                self._connection.send(to_line(self._to_send.popleft()))
            self._send_heartbeats([self._connection])
            if self._connection.since_message.seconds() > LOST_SECONDS:
                lost = f"silent for {LOST_SECONDS:.0f} seconds"
        if lost and not self._ended:
            self._received.append(AgentLost(0, self._connection.host, lost))
        self._connection.close()


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _plain(address: str) -> str:
    """The address without the prefix of ::ffff:10.0.0.1, which is 10.0.0.1 on a socket for IPv4 and IPv6."""
    return address.removeprefix("::ffff:")
