"""Connects the agents of a run's machines: node 0 writes its address and ports to a file in the run's folder, where the
other nodes look for them. The meeting is this file, `meeting/NAME.json`; where the run ends before all nodes have come,
it holds the outcome for those that come later."""

import json
import os
import secrets
import socket
from dataclasses import asdict
from pathlib import Path

import psutil

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.data.files import write_whole
from kilobatch.launch.nodes.connections import Connection, HubConnection, NodeConnection, is_loopback
from kilobatch.launch.processes.exit_status import RunOutcome, this_host
from kilobatch.launch.worker.ports import listen


def open_hub(folder: Path, name: str, interface: str | None, store_port: int) -> HubConnection:
    """On node 0: listens for the other agents, and writes to the meeting's file where."""
    listening, token = listen(name), secrets.token_hex(16)
    machine, numeric = socket.gethostname(), addresses(interface)
    meeting = {
        "token": token,
        "name": this_host(),
        "machine": machine,
        "addresses": [*numeric, machine] if interface else [machine, *numeric],
        "port": listening.getsockname()[1],
        "store": store_port,
    }
    path = _file(folder, name)
    path.parent.mkdir(exist_ok=True)
    for earlier in path.parent.glob("*.json"):  # the outcomes of attempts before, which nobody waits for any more
        earlier.unlink(missing_ok=True)
    write_whole(path, [json.dumps(meeting).encode()])
    return HubConnection(listening, token)


def remove_file(folder: Path, name: str) -> None:
    """On node 0: removes the meeting's file."""
    _file(folder, name).unlink(missing_ok=True)


def leave_outcome(folder: Path, name: str, outcome: RunOutcome) -> None:
    """On node 0: tells nodes that have not joined yet how the run has ended, so that they do not wait for it."""
    write_whole(_file(folder, name), [json.dumps({"outcome": asdict(outcome)}).encode()])


def join(folder: Path, name: str, node: int, host: str) -> tuple[NodeConnection, int] | RunOutcome | None:
    """On another node: connects to node 0. Returns the connection and the port of the store; the run's outcome where it
    has ended without this node; None where node 0 has not opened the meeting yet."""
    path = _file(folder, name)
    # The folder is listed, since a network file system may remember for a while that a file did not exist.
    if not path.parent.is_dir() or path.name not in os.listdir(path.parent):  # noqa: PTH208
        return None
    try:
        meeting = json.loads(path.read_bytes())
    except FileNotFoundError:  # node 0 has just removed it
        return None
    if "outcome" in meeting:
        return RunOutcome(**meeting["outcome"])
    loopback = ["127.0.0.1"] if socket.gethostname() == meeting["machine"] else []
    for address in [*loopback, *meeting["addresses"]]:
        if connection := _connect(address, meeting["port"], meeting["token"], node, host):
            connection.host = meeting["name"]
            return NodeConnection(connection), meeting["store"]
    return None


def _connect(address: str, port: int, token: str, node: int, host: str) -> Connection | None:
    """A connection to node 0; None where nothing listens at that address, or something that does not know the token."""
    try:
        connection = Connection(socket.create_connection((address, port), timeout=3))
    except OSError:
        return None
    connection.send(json.dumps([token, node, host]).encode() + b"\n")
    if connection.receive_exactly(len(token)) == token.encode():
        return connection
    connection.close()
    return None


def _file(folder: Path, name: str) -> Path:
    return folder / "meeting" / f"{name}.json"


def check_interface(interface: str) -> None:
    """Raises UserError where this machine lacks a network interface; `interface` may name several, as in a,b."""
    interfaces = psutil.net_if_addrs()
    for name in interface.split(","):
        if name not in interfaces:
            raise UserError(f"{this_host()} has no network interface '{name}'{did_you_mean(name, interfaces)}")


def addresses(interface: str | None) -> list[str]:
    """The addresses by which other machines may reach this one; those of `interface` come first."""
    preferred = interface.split(",") if interface else []
    families = (socket.AF_INET, socket.AF_INET6)
    found = [
        (name not in preferred, families.index(entry.family), entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families and not is_loopback(entry.address) and not entry.address.startswith("fe80:")
    ]
    return [address for _, _, address in sorted(found)]


def interface_of(address: str) -> str:
    """The network interface of this machine that has the address."""
    interfaces = psutil.net_if_addrs().items()
    return next(name for name, entries in interfaces if address in [entry.address for entry in entries])
