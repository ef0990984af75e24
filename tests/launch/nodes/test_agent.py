"""Agents of several nodes, each a process of its own as on a cluster: they connect, and end together for each reason
that a run may have to end."""

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from kilobatch.data.sources.convert import prepare
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.recipes.recipe import read_recipe
from kilobatch.launch.runs import run_folder
from kilobatch.launch.worker import ports
from kilobatch.trainer.checkpoint.reader import newest
from tests.helpers.node_agents import SERVER, main
from tests.helpers.real_runs import RECIPE, logged


class Nodes:
    """Starts agents and collects what they return."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.agents: dict[int, tuple[ForkServerProcess, Connection]] = {}

    def start(self, nodes: int, workers: int, module: str, *arguments: str, stall: float = 5, only: str = "") -> None:
        for node in map(int, only or "".join(map(str, range(nodes)))):
            ours, theirs = SERVER.Pipe(duplex=False)
            arguments_of_main = theirs, self.folder, node, nodes, workers, stall, module, [*arguments]
            process = SERVER.Process(target=main, args=arguments_of_main)
            process.start()
            theirs.close()
            self.agents[node] = process, ours

    def run(self, nodes: int, what: str, stall: float = 5) -> RunOutcome:
        """Two workers on each node."""
        self.start(nodes, 2, "scripted_worker", what, str(self.folder), stall=stall)
        return self.outcome()

    def wait_for_workers(self, workers: int) -> None:
        until(lambda: len(self.pids()) == workers)

    def pids(self) -> list[int]:
        return [int(text) for file in self.folder.glob("pid-*") if (text := file.read_text())]

    def signal(self, node: int, number: signal.Signals) -> None:
        pid = self.agents[node][0].pid
        assert pid is not None
        os.kill(pid, number)

    def outcome_of(self, node: int) -> RunOutcome:
        process, outcomes = self.agents[node]
        assert outcomes.poll(240), "the agent returned nothing within 240 s"
        outcome = outcomes.recv()
        process.join()
        del self.agents[node]
        assert process.exitcode == 0
        return outcome

    def outcome(self) -> RunOutcome:
        """The outcome, which is the same for all agents that are left. No worker outlives them."""
        outcomes = [self.outcome_of(node) for node in list(self.agents)]
        assert all(outcome == outcomes[0] for outcome in outcomes), outcomes
        assert not any(Path(f"/proc/{pid}").exists() for pid in self.pids())
        return outcomes[0]


def until(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    yield nodes
    for agent, _ in nodes.agents.values():
        agent.kill()
        agent.join()


def test_three_nodes_meet_and_finish(nodes: Nodes):
    assert nodes.run(3, "finishes").kind == "finished"
    for rank in range(6):
        written = (nodes.folder / "logs" / f"rank-{rank}.log").read_text().split()[1:]
        prepared = ["of", "node", "0"] if rank < 2 else []  # what node 0 has prepared it names to its own workers
        assert written == [str(rank), "6", str(rank % 2), "2", "127.0.0.1", "lo", *prepared]
    assert list((nodes.folder / "meeting").iterdir()) == []


def test_the_first_to_fail_is_named_though_others_were_reported_before(nodes: Nodes):
    outcome = nodes.run(2, "fails")
    assert (outcome.kind, outcome.rank, outcome.host, outcome.how) == ("failed", 2, "n1", "exit code 1")
    assert outcome.lines[-2:] == ["line 29", "RuntimeError: the disk of rank 2 is on fire"]


def test_a_killed_worker_ends_all_nodes(nodes: Nodes):
    nodes.start(2, 2, "scripted_worker", "dies", str(nodes.folder))
    nodes.wait_for_workers(4)
    began = time.monotonic()
    outcome = nodes.outcome()
    assert time.monotonic() - began < 60
    assert (outcome.kind, outcome.rank, outcome.host) == ("failed", 2, "n1")
    assert outcome.how.startswith("ended by SIGKILL")


def test_a_refusal_counts_more_than_the_failures_that_follow(nodes: Nodes):
    outcome = nodes.run(2, "refuses")
    assert (outcome.kind, outcome.rank, outcome.host) == ("refused", 1, "n0")
    assert outcome.lines == ["kilobatch: no room on the disk"]


def test_node_0_refuses_before_any_worker_starts(nodes: Nodes):
    outcome = nodes.run(2, "unprepared")
    assert (outcome.kind, outcome.rank, outcome.host) == ("refused", None, "n0")
    assert outcome.lines == ["kilobatch: no images there"]
    assert nodes.pids() == []


def test_a_node_that_comes_when_all_is_over_is_told_how_it_ended(nodes: Nodes):
    nodes.start(2, 2, "scripted_worker", "unprepared", str(nodes.folder), only="0")
    refused = nodes.outcome_of(0)
    assert refused.kind == "refused"
    nodes.start(2, 2, "scripted_worker", "unprepared", str(nodes.folder), only="1")
    assert nodes.outcome_of(1) == refused


@pytest.mark.parametrize(("node", "number"), [(0, signal.SIGUSR2), (1, signal.SIGTERM)])
def test_a_signal_to_one_node_makes_all_nodes_save_and_end(nodes: Nodes, node: int, number: signal.Signals):
    nodes.start(2, 2, "scripted_worker", "saves", str(nodes.folder))
    nodes.wait_for_workers(4)
    nodes.signal(node, number)
    assert nodes.outcome() == RunOutcome("interrupted", how=f"{number.name} on n{node}")
    assert len(list(nodes.folder.glob("saved-*"))) == 4


def test_a_signal_while_the_workers_start(nodes: Nodes):
    nodes.start(2, 2, "scripted_worker", "starts", str(nodes.folder))
    nodes.wait_for_workers(4)
    nodes.signal(1, signal.SIGTERM)
    assert nodes.outcome().kind == "interrupted"


def test_a_scheduler_that_signals_the_workers_first(nodes: Nodes):
    nodes.start(2, 2, "scripted_worker", "starts", str(nodes.folder))
    nodes.wait_for_workers(4)
    for pid in nodes.pids():
        os.kill(pid, signal.SIGUSR2)
    time.sleep(1)  # the agents may be the last to run on a busy machine
    nodes.signal(0, signal.SIGUSR2)
    assert nodes.outcome().kind == "interrupted"


def test_a_signal_while_waiting_for_the_others(nodes: Nodes):
    nodes.start(3, 2, "scripted_worker", "saves", str(nodes.folder), only="02")
    until(lambda: (nodes.folder / "meeting").exists())
    time.sleep(1)
    nodes.signal(2, signal.SIGTERM)
    outcome = nodes.outcome()
    assert (outcome.kind, outcome.how) == ("interrupted", "SIGTERM on n2")
    assert nodes.pids() == []


@pytest.mark.parametrize("node", [0, 1])
def test_the_loss_of_a_killed_agent_is_noticed_at_once(nodes: Nodes, node: int):
    nodes.start(3, 2, "scripted_worker", "saves", str(nodes.folder))
    nodes.wait_for_workers(6)
    killed, _ = nodes.agents.pop(node)
    killed.kill()
    killed.join()
    began = time.monotonic()
    outcome = nodes.outcome()
    assert time.monotonic() - began < 60
    assert (outcome.kind, outcome.rank, outcome.host) == ("lost", None, f"n{node}")
    assert outcome.how == "its agent has ended"


def test_a_silent_agent_is_lost(nodes: Nodes):
    """A stopped agent is like one whose machine is gone: nothing closes its connection."""
    nodes.start(2, 2, "scripted_worker", "saves", str(nodes.folder))
    nodes.wait_for_workers(4)
    nodes.signal(1, signal.SIGSTOP)
    outcome = nodes.outcome_of(0)
    assert (outcome.kind, outcome.host, outcome.how) == ("lost", "n1", "silent for 5 seconds")
    nodes.signal(1, signal.SIGCONT)
    assert nodes.outcome().kind == "lost", (
        "the agent that was stopped ends its workers, and does not report a finished run"
    )


def test_a_hang_is_named_with_the_stacks_of_all_ranks(nodes: Nodes):
    outcome = nodes.run(2, "hangs", stall=2 / 60)
    assert (outcome.kind, outcome.rank, outcome.host) == ("stalled", 1, "n0")
    assert outcome.how.endswith("rank 1: the least far")
    for rank in range(4):
        assert "most recent call first" in (nodes.folder / "logs" / f"rank-{rank}.log").read_text()


def test_jobs_on_one_machine_take_different_ports():
    first, same, other = ports.listen("7-0"), ports.listen("7-0"), ports.listen("8-0")
    with first, same, other:
        numbers = [listening.getsockname()[1] for listening in (first, same, other)]
        assert len(set(numbers)) == 3
        assert numbers[1] == numbers[0] + 1 or numbers[0] == ports.FIRST_PORT + ports.PORTS - 1
        assert all(ports.FIRST_PORT <= port < ports.FIRST_PORT + ports.PORTS for port in numbers)
    with ports.listen("7-0") as again:
        assert again.getsockname()[1] == numbers[0], "once free, it is the same port"


def test_a_connection_without_the_token_is_refused_and_does_no_harm(nodes: Nodes):
    nodes.start(2, 2, "scripted_worker", "finishes", str(nodes.folder), only="0")
    file = nodes.folder / "meeting" / "7-0.json"
    until(file.exists)
    with socket.create_connection(("127.0.0.1", json.loads(file.read_text())["port"])) as stranger:
        stranger.sendall(b'["guess", 1, "n1"]\n')
        assert stranger.recv(100) == b""
    nodes.start(2, 2, "scripted_worker", "finishes", str(nodes.folder), only="1")
    assert nodes.outcome().kind == "finished"


@pytest.mark.slow  # tests/slurm does the same on a real cluster
def test_real_workers_on_two_nodes_stop_and_go_on(nodes: Nodes):
    recipe, _ = read_recipe("demo", [*RECIPE[1:], "schedule.epochs=3", f"run.folder={nodes.folder}"])
    prepare(recipe.data.train, "train")
    prepare(str(recipe.data.test), "test")
    nodes.folder = run_folder.create_run(recipe.run, "demo", recipe.dump_yaml(), 2)
    nodes.start(2, 1, "kilobatch.launch.worker.main", str(nodes.folder), stall=2)
    until(lambda: logged(nodes.folder) >= 5)
    nodes.signal(1, signal.SIGUSR2)
    assert nodes.outcome() == RunOutcome("interrupted", how="SIGUSR2 on n1", stepped=True)
    stopped = logged(nodes.folder)
    assert 5 <= stopped < 33
    saved = newest(nodes.folder / "checkpoints", pytest.fail)
    assert saved is not None and saved.name == f"step-{stopped:08d}"
    nodes.start(2, 1, "kilobatch.launch.worker.main", str(nodes.folder), stall=2)
    assert nodes.outcome().kind == "finished"
    assert f"going on from step {stopped} of 33" in (nodes.folder / "logs" / "rank-0.log").read_text()
