"""How agents tell each other their news: each has a connection to node 0's agent, which tells all, in its order.

Lines over TCP; an empty one is a heartbeat. An agent that dies closes its connection, which is seen at once; one whose
machine is gone is seen by its silence. A thread does it, so that a slow disk under the logs silences no agent.
"""

import json
import os
import selectors
import socket
import threading
import time
from collections import deque

from kilobatch.launch.processes.events import Came, Lost, News, Over, from_line, to_line
from kilobatch.launch.processes.stall_timer import Silence

BEAT = 2.0  # seconds between heartbeats
LOST = 20.0  # seconds of silence after which an agent is taken for dead
FAREWELL = 10.0  # seconds that node 0 waits for the others to have read its last word


class Connection:
    """To another agent."""

    def __init__(self, channel: socket.socket) -> None:
        self.node, self.host = -1, ""  # not yet known
        self.silence = Silence()
        self._channel, self._partial = channel, b""
        channel.settimeout(5.0)  # a full buffer: nobody reads

    def fileno(self) -> int:
        return self._channel.fileno()

    @property
    def local(self) -> str:
        """Our own address on the way to the other."""
        return _plain(self._channel.getsockname()[0])

    @property
    def remote(self) -> str:
        return _plain(self._channel.getpeername()[0])

    def send(self, data: bytes) -> None:
        """A failure shows when reading: as an end, or as silence."""
        try:
            self._channel.sendall(data)
        except OSError:
            self.shut()

    def answer(self, length: int) -> bytes:
        """The first so many bytes that come, fewer where no more do in time."""
        data = b""
        try:
            while len(data) < length and (more := self._channel.recv(length - len(data))):
                data += more
        except OSError:
            return data
        return data

    def receive(self) -> list[bytes] | None:
        """Whole lines that are no heartbeats; None at its end. Blocks until something has come."""
        try:
            data = self._channel.recv(1 << 16)
        except OSError:
            return None
        if not data:
            return None
        self.silence.broken()
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [line for line in lines if line]

    def shut(self) -> None:
        try:
            self._channel.shutdown(socket.SHUT_RDWR)
        except OSError:  # it is already
            return

    def close(self) -> None:
        self._channel.close()


class _Board:
    """What both ends have in common: the thread, and the news that go in and out of it."""

    def __init__(self) -> None:
        self._in: deque[News] = deque()
        self._out: deque[News] = deque()
        self._selector = selectors.DefaultSelector()
        self._woken, self._waker = os.pipe()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._closing = False
        self._error: BaseException | None = None
        self._beaten = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    def post(self, news: News) -> None:
        self._out.append(news)
        os.write(self._waker, b".")

    def read(self) -> list[News]:
        if self._error is not None:
            raise self._error
        return [self._in.popleft() for _ in range(len(self._in))]

    def close(self) -> None:
        self._closing = True
        os.write(self._waker, b".")
        self._thread.join()
        self._selector.close()
        os.close(self._woken)
        os.close(self._waker)

    def _run(self) -> None:
        try:
            self._talk()
        except BaseException as error:  # raised again where the news are read
            self._error = error

    def _talk(self) -> None:
        raise NotImplementedError

    def _ready(self) -> list[selectors.SelectorKey]:
        keys = [key for key, _ in self._selector.select(0.5)]
        if any(key.fileobj == self._woken for key in keys):
            os.read(self._woken, 1 << 16)
        return [key for key in keys if key.fileobj != self._woken]

    def _beat(self, connections: list[Connection]) -> None:
        if time.monotonic() - self._beaten >= BEAT:
            self._beaten = time.monotonic()
            for connection in connections:
                connection.send(b"\n")


class Hub(_Board):
    """Node 0's end. Takes whoever knows the token; connections, by node, are those of agents that are still there."""

    def __init__(self, listening: socket.socket, token: str) -> None:
        super().__init__()
        self.outward = ""  # our address among machines; empty while all agents have come from this one
        self._listening, self._token = listening, token
        self._connections: list[Connection] = []
        self._said = b""  # all news so far, for those that come later
        self._over = False
        self._come: set[int] = {0}
        self._selector.register(listening, selectors.EVENT_READ, None)
        self._thread.start()

    def close(self) -> None:
        super().close()
        self._listening.close()

    def _talk(self) -> None:
        until = None
        while True:
            for key in self._ready():
                if key.fileobj is self._listening:
                    self._accept()
                else:
                    self._hear(key.data)
            while self._out:
                self._publish(self._out.popleft())
            self._beat(self._connections)
            for connection in list(self._connections):
                if connection.silence.seconds() > LOST:
                    self._gone(connection, f"silent for {LOST:.0f} seconds")
            if self._closing:
                until = until or time.monotonic() + (FAREWELL if self._over else 0.0)
                if not any(one.node >= 0 for one in self._connections) or time.monotonic() > until:
                    break
        for connection in self._connections:
            connection.close()

    def _accept(self) -> None:
        channel, _ = self._listening.accept()
        connection = Connection(channel)
        self._connections.append(connection)
        self._selector.register(connection, selectors.EVENT_READ, connection)

    def _hear(self, connection: Connection) -> None:
        lines = connection.receive()
        if lines is None:
            self._gone(connection, "its agent has ended")
            return
        for line in lines:
            if connection.node >= 0:
                self._publish(from_line(line))
            elif not self._greet(connection, line):
                self._gone(connection, "a stranger")
                return

    def _greet(self, connection: Connection, line: bytes) -> bool:
        """Whether the first line of a connection is an agent's."""
        try:
            token, node, host = json.loads(line)
        except (ValueError, TypeError):
            return False
        if token != self._token or node in self._come:
            return False
        connection.node, connection.host = node, host
        connection.send(self._token.encode() + b"\n" + self._said)
        if not is_loopback(connection.remote):
            self.outward = self.outward or connection.local
        self._come.add(node)
        self._publish(Came(node, host))
        return True

    def _publish(self, news: News) -> None:
        line = to_line(news)
        self._said += line
        self._in.append(news)
        self._over = self._over or isinstance(news, Over)
        for connection in self._connections:
            if connection.node >= 0:
                connection.send(line)

    def _gone(self, connection: Connection, how: str) -> None:
        self._selector.unregister(connection)
        self._connections.remove(connection)
        connection.close()
        if connection.node >= 0 and not self._over:
            self._publish(Lost(connection.node, connection.host, how))


class Spoke(_Board):
    """Another node's end."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._over = False
        self.local, self.remote = connection.local, connection.remote
        self._selector.register(connection, selectors.EVENT_READ)
        self._thread.start()

    def _talk(self) -> None:
        ended = ""
        while not self._closing and not ended:
            if self._ready():
                lines = self._connection.receive()
                if lines is None:
                    ended = "its agent has ended"
                for line in lines or []:
                    news = from_line(line)
                    self._over = self._over or isinstance(news, Over)
                    self._in.append(news)
            while self._out:
                self._connection.send(to_line(self._out.popleft()))
            self._beat([self._connection])
            if self._connection.silence.seconds() > LOST:
                ended = f"silent for {LOST:.0f} seconds"
        if ended and not self._over:
            self._in.append(Lost(0, self._connection.host, ended))
        self._connection.close()


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _plain(address: str) -> str:
    """::ffff:10.0.0.1 is how a socket for both families writes 10.0.0.1."""
    return address.removeprefix("::ffff:")
