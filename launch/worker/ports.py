"""Chooses the ports that a job tries, and listens on the first free one."""

import errno
import hashlib
import socket
from collections.abc import Iterator

from kilobatch.data.errors import UserError

FIRST_PORT, PORTS = 20000, 10000  # below the ports that the kernel gives out by itself


def ports(name: str) -> Iterator[int]:
    """The ports to try for a name, such as a job's, in order. They depend on the name alone: the processes of a job get
    the same, and two jobs mostly different ones."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return (FIRST_PORT + (start + n) % PORTS for n in range(PORTS))


def listen(name: str) -> socket.socket:
    """A socket that listens on the first free port of a name. Raises UserError where there is none."""
    dual = socket.has_dualstack_ipv6()
    for port in ports(name):
        try:
            family = socket.AF_INET6 if dual else socket.AF_INET
            return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=1024)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
    raise UserError(f"no port between {FIRST_PORT} and {FIRST_PORT + PORTS} is free on {socket.gethostname()}")
