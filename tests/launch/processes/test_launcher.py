"""The launcher with real processes and real process groups: start, failure, hang, stop and its own death."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from kilobatch.launch.processes import launcher, supervisor
from kilobatch.launch.processes.events import LAST_LINES
from kilobatch.launch.processes.exit_status import RunOutcome, this_host
from kilobatch.launch.processes.worker_processes import STORE_FILE, WorkerGroup
from kilobatch.trainer.ranks import gpu_driver
from tests.helpers.node_agents import SERVER
from tests.helpers.programs import PROGRAMS
from tests.helpers.scripted_runs import alive, log_lines, until


class Launcher:
    """A process of its own that runs workers, and sends back how they ended."""

    def __init__(self, folder: Path, workers: int, module: str, what: str) -> None:
        self._outcome, theirs = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=_launch, args=(theirs, folder, workers, module, what))
        self.process.start()
        theirs.close()

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def outcome(self) -> RunOutcome:
        assert self._outcome.poll(60), "it sends nothing"
        outcome = self._outcome.recv()
        self.process.join()
        assert self.process.exitcode == 0
        return outcome


def _launch(answer: Connection, folder: Path, workers: int, module: str, what: str) -> None:
    os.environ |= {"PYTHONPATH": str(PROGRAMS), "OMP_NUM_THREADS": "1"}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
    supervisor.GRACE = 0.5
    answer.send(launcher.run_workers(folder, workers, module, [what, str(folder)]))


@pytest.mark.parametrize("driver", [False, True], ids=["a file", "a served store"])
def test_workers_meet_finish_and_write_logs(
    driver: bool, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """They meet in a file where there is no GPU's driver, else in a store that the launcher serves."""
    (folder / "dev").mkdir()
    monkeypatch.setattr(gpu_driver, "DEV", folder / "dev")
    monkeypatch.setenv("KILOBATCH_STORE", str(folder / "of-others"))
    if driver:
        (folder / "dev" / "nvidiactl").touch()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert launcher.run_workers(folder, 2, "scripted_rank", ["finishes", str(folder)]) == RunOutcome("finished")
    assert log_lines(folder, 0) == ["rank 0 of 2, 1 threads"]
    assert log_lines(folder, 1) == ["rank 1 of 2, 1 threads"]
    assert capfd.readouterr().out == "rank 0 of 2, 1 threads\n"
    (store,) = {(folder / f"store-{rank}").read_text() for rank in (0, 1)}
    assert bool(store) != driver and not Path(store or folder / "of-others").exists()
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_the_store_outlives_a_jobs_signals_and_ends_with_its_launcher(folder: Path):
    """A job's end signals every process of it; the workers still need the store to save."""
    listening = socket.create_server(("127.0.0.1", 0))
    group = WorkerGroup(0, 2, "127.0.0.1", listening.getsockname()[1], {STORE_FILE: ""})
    before = {child.pid for child in psutil.Process().children()}
    with launcher.serve_store(listening, group):
        (server,) = (child for child in psutil.Process().children() if child.pid not in before)
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGCONT):  # while it still loads torch
            server.send_signal(number)
        store = TCPStore("127.0.0.1", group.port, timeout=timedelta(seconds=60))
        server.send_signal(signal.SIGTERM)
        store.set("key", "value")
        assert store.get("key") == b"value"
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set()), "only the server is spared"
    assert not psutil.pid_exists(server.pid)


def test_workers_import_nothing_from_the_folder_that_they_are_started_in(folder: Path, monkeypatch: pytest.MonkeyPatch):
    own = folder / "own"
    own.mkdir()
    for name in ("ctypes", "selectors", "kilobatch", "scripted_rank"):
        (own / f"{name}.py").write_text("raise SystemExit('a module of the caller')\n")
    monkeypatch.chdir(own)
    for path in ("", ".:", ":"):  # an empty entry stands for the folder, too
        monkeypatch.setenv("PYTHONPATH", f"{path}{PROGRAMS}")
        outcome = launcher.run_workers(folder, 1, "scripted_worker", ["finishes", str(folder)])
        assert outcome == RunOutcome("finished"), path


def test_first_to_fail_is_named_with_its_last_lines_and_the_others_end(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    outcome = launcher.run_workers(folder, 2, "scripted_worker", ["fails", str(folder)])
    assert (outcome.kind, outcome.rank, outcome.host, outcome.how) == ("failed", 1, this_host(), "exit code 1")
    assert outcome.lines[-1].endswith("RuntimeError: the disk of rank 1 is on fire")
    assert len(outcome.lines) == LAST_LINES
    assert alive(folder, 2) == []


def test_a_killed_worker_is_named_by_its_signal_and_a_deaf_one_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    outcome = launcher.run_workers(folder, 2, "scripted_worker", ["dies", str(folder)])  # rank 0 does not heed SIGTERM
    assert (outcome.kind, outcome.rank) == ("failed", 1)
    assert outcome.how.startswith("ended by SIGKILL")
    assert alive(folder, 2) == []


def test_a_refusal_of_another_rank_than_0_is_the_message(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "GRACE", 0.5)
    outcome = launcher.run_workers(folder, 2, "scripted_rank", ["refuses", str(folder)])
    assert (outcome.kind, outcome.rank) == ("refused", 1)
    assert outcome.lines == ["kilobatch: no room on the disk:", "  of this machine"]
    assert alive(folder, 2) == []


def test_a_refusal_of_all_is_rank_0s(folder: Path, capfd: pytest.CaptureFixture[str]):
    outcome = launcher.run_workers(folder, 2, "scripted_rank", ["all refuse", str(folder)])
    assert (outcome.kind, outcome.rank) == ("refused", 0), "so that the launcher need not tell it again"
    assert capfd.readouterr().out.count("no room on the disk") == 1


def test_asked_to_stop_the_workers_save_and_leave(folder: Path):
    process = Launcher(folder, 2, "scripted_rank", "waits")
    until(lambda: all((folder / f"met-{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGINT)
    assert process.outcome() == RunOutcome("interrupted", how="SIGINT")
    assert alive(folder, 2) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_ask_as_well(folder: Path, number: signal.Signals):
    process = Launcher(folder, 1, "scripted_worker", "saves")
    until(lambda: alive(folder, 1) == [0])
    process.send_signal(number)
    assert process.outcome() == RunOutcome("interrupted", how=number.name)
    assert (folder / "saved-0").exists()


def test_asked_twice_kills(folder: Path):
    process = Launcher(folder, 1, "scripted_rank", "stays")
    until(lambda: alive(folder, 1) == [0])
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert alive(folder, 1) == [0]
    process.send_signal(signal.SIGINT)
    assert process.outcome().kind == "interrupted"
    assert alive(folder, 1) == []


def test_a_second_hangup_does_not_kill(folder: Path):
    process = Launcher(folder, 1, "scripted_rank", "stays")
    until(lambda: alive(folder, 1) == [0])
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
    assert alive(folder, 1) == [0]
    process.send_signal(signal.SIGINT)
    assert process.outcome().kind == "interrupted"


def test_asked_to_stop_while_one_still_starts_and_the_others_wait_for_it(folder: Path):
    process = Launcher(folder, 2, "scripted_rank", "starts")
    until(lambda: alive(folder, 2) == [0, 1])
    process.send_signal(signal.SIGINT)
    assert process.outcome().kind == "interrupted"
    assert alive(folder, 2) == []


def test_asked_to_stop_at_the_end_it_has_finished(folder: Path):
    process = Launcher(folder, 1, "scripted_rank", "ends anyway")
    until(lambda: alive(folder, 1) == [0])
    process.send_signal(signal.SIGINT)
    assert process.outcome() == RunOutcome("finished")


def test_a_killed_launcher_takes_its_workers_along(folder: Path):
    process = Launcher(folder, 2, "scripted_rank", "stays")
    until(lambda: alive(folder, 2) == [0, 1])
    process.process.kill()
    process.process.join()
    until(lambda: alive(folder, 2) == [], seconds=10)


def test_a_launcher_that_died_before_its_worker_was_set_to_die_with_it(folder: Path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    command = [
        sys.executable,
        "-m",
        "kilobatch.launch.processes.parent_death",
        gone.stdout.strip(),
        "scripted_rank",
        "finishes",
        str(folder),
    ]
    late = subprocess.run(command, capture_output=True, text=True)
    assert late.returncode == 1
    assert "the launcher is gone" in late.stderr
    assert [path.name for path in folder.iterdir()] == ["logs"]


def test_a_log_that_cannot_be_written_ends_the_run_as_a_refusal(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor, "OUTPUT_GRACE", 0.2)
    (folder / "logs" / "rank-1.log").symlink_to("/dev/full")
    outcome = launcher.run_workers(folder, 2, "scripted_worker", ["saves", str(folder)])
    assert (outcome.kind, outcome.rank) == ("refused", None)
    assert len(outcome.lines) == 1
    assert outcome.lines[0].startswith(
        f"kilobatch: {folder}/logs/rank-1.log could not be written: no room left (No space"
    )
    assert (folder / "saved-0").exists() and (folder / "saved-1").exists()


def test_a_log_that_lacks_its_last_lines_is_told(folder: Path, capfd: pytest.CaptureFixture[str]):
    (folder / "logs" / "rank-0.log").symlink_to("/dev/full")
    assert launcher.run_workers(folder, 1, "scripted_worker", ["finishes", str(folder)]) == RunOutcome("finished")
    assert "kilobatch: warning: " in capfd.readouterr().err
