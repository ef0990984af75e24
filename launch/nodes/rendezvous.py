"""Where the agents of a run's machines meet: node 0's tells its address and ports by a file in the run's folder."""

import json
import os
import secrets
import socket
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from kilobatch.data.errors import Refusal, did_you_mean
from kilobatch.data.files import write_whole
from kilobatch.launch.nodes.connections import Connection, Hub, Spoke, is_loopback
from kilobatch.launch.processes.exit_status import this_host
from kilobatch.launch.processes.ports import listen

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]


def open_store(name: str) -> "TCPStore":
    """The store where the workers meet, in this process."""
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # the other agents need no torch

    listening = listen(name)
    port = listening.getsockname()[1]
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=30),
        master_listen_fd=listening.detach(),
    )


def host(folder: Path, name: str, interface: str | None, store_port: int) -> Hub:
    """Node 0: waits for connections, and says where."""
    listening, token = listen(name), secrets.token_hex(16)
    machine, numbers = socket.gethostname(), addresses(interface)
    at = {
        "token": token,
        "name": this_host(),
        "machine": machine,
        "addresses": [*numbers, machine] if interface else [machine, *numbers],
        "port": listening.getsockname()[1],
        "store": store_port,
    }
    path = _file(folder, name)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, [json.dumps(at).encode()])
    return Hub(listening, token)


def leave(folder: Path, name: str) -> None:
    """Node 0 takes its file away."""
    _file(folder, name).unlink(missing_ok=True)


def attend(folder: Path, name: str, node: int, host: str) -> tuple[Spoke, int] | None:
    """Another node: connects, if node 0 is there yet. Returns also the port of the store."""
    path = _file(folder, name)
    # The folder is listed, since a network disk may remember for a while that a file was not there.
    if not path.parent.is_dir() or path.name not in os.listdir(path.parent):  # noqa: PTH208
        return None
    try:
        at = json.loads(path.read_bytes())
    except FileNotFoundError:  # node 0 has just left
        return None
    here = ["127.0.0.1"] if socket.gethostname() == at["machine"] else []
    for address in [*here, *at["addresses"]]:
        if connection := _connect(address, at["port"], at["token"], node, host):
            connection.host = at["name"]
            return Spoke(connection), at["store"]
    return None


def _connect(address: str, port: int, token: str, node: int, host: str) -> Connection | None:
    """None where nobody, or somebody else, is found there."""
    try:
        connection = Connection(socket.create_connection((address, port), timeout=3))
    except OSError:
        return None
    connection.send(json.dumps([token, node, host]).encode() + b"\n")
    if connection.answer(len(token)) == token.encode():
        return connection
    connection.close()
    return None


def _file(folder: Path, name: str) -> Path:
    return folder / "meeting" / f"{name}.json"


def check_interface(interface: str) -> None:
    """Raises Refusal where this machine has no such network interface, or (a,b) not all of them."""
    every = psutil.net_if_addrs()
    for name in interface.split(","):
        if name not in every:
            raise Refusal(f"{this_host()} has no network interface '{name}'{did_you_mean(name, every)}")


def addresses(interface: str | None) -> list[str]:
    """Those of this machine by which others may reach it; those of `interface` first, where there are some."""
    preferred = interface.split(",") if interface else []
    families = (socket.AF_INET, socket.AF_INET6)
    found = [
        (name not in preferred, families.index(one.family), one.address)
        for name, ones in psutil.net_if_addrs().items()
        for one in ones
        if one.family in families and not is_loopback(one.address) and not one.address.startswith("fe80:")
    ]
    return [address for _, _, address in sorted(found)]


def interface_of(address: str) -> str:
    """The network interface that has this address of ours."""
    return next(name for name, ones in psutil.net_if_addrs().items() if address in [one.address for one in ones])
