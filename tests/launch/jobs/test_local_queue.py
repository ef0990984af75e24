"""Jobs in the background of this machine, with real processes: signals, failures, bounds, cancellation."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.data.errors import Refusal
from kilobatch.launch.jobs import local_queue as local
from kilobatch.launch.recipes import recipe
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs import run_folder as runs
from kilobatch.launch.runs.job_history import Attempt, JobFile
from kilobatch.launch.schedulers.local import Local
from tests.helpers.programs import PROGRAMS

# A job as `python -m kilobatch.launch.jobs.local_queue` runs it, but that its workers run errands.
LOCAL = """
import sys
from functools import partial
from kilobatch.launch.jobs import attempt, local_queue as local
from kilobatch.launch.nodes import agent
agent.run = partial(agent.run, module="scripted_job")
attempt.GLANCE, local.PAUSE = 0.2, 0.1
local.main()
"""
CODE = Path(__file__).parents[3] / "src"


@pytest.fixture(autouse=True)
def _at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(local, "_arguments", lambda folders: [sys.executable, "-c", LOCAL, *map(str, folders)])


def submitted(name: str, errands: list[str], changes: list[str] | None = None, **known: object) -> Path:
    chosen = recipe.resolve("demo", [f"run.name={name}", *(changes or [])])
    folder = runs.create(chosen.run, "demo", chosen.dump_yaml(), 2).absolute()
    (folder / "errands").write_text("\n".join(errands))
    job = JobFile(cluster="local", job_id="", workers_per_node=2, submitted=ledger.now(), code="code/001")
    ledger.write_job_file(folder, job.model_copy(update=known))
    runs.set_status(folder, "queued", 2)
    return folder


def start(*folders: Path) -> list[str]:
    ids = local.start(folders, CODE)
    for folder, job_id in zip(folders, ids, strict=True):
        job = ledger.job_file(folder)
        assert job is not None
        ledger.write_job_file(folder, job.model_copy(update={"job_id": job_id}))
    return ids


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_over(job: str) -> bool:
    return Local().states([job])[job].state == "gone"


def busy(folder: Path, attempt: int) -> Callable[[], bool]:
    """Whether both workers of the attempt are at their errand."""
    return lambda: all((folder / f"at-{attempt}-{rank}").exists() for rank in (0, 1))


def ends(folder: Path) -> list[tuple[str | None, int | None, bool]]:
    return [(one.reason, one.step, one.requeued) for one in ledger.read(folder)]


def last(folder: Path) -> Attempt:
    return ledger.read(folder)[-1]


def test_a_job_goes_on_after_signals_and_a_crash_until_it_has_finished():
    folder = submitted("mine", ["waits", "fails (once)", "waits", "finishes"])
    (job,) = start(folder)
    assert runs.status(folder) in ("queued", "running")
    for attempt in (1, 3):
        until(busy(folder, attempt))
        assert Local().states([job])[job].state == "running"
        assert runs.status(folder) == "running"
        Local().signal(job, "USR2")
    until(lambda: is_over(job))
    assert ends(folder) == [
        ("preempted", 1, True),
        ("crashed", 1, True),
        ("preempted", 2, True),
        ("finished", 2, False),
    ]
    attempts = ledger.read(folder)
    assert [one.from_step for one in attempts] == [0, 1, 1, 2]
    assert [one.restart for one in attempts] == [0, 1, 2, 3]
    assert {one.job for one in attempts} == {job}
    assert attempts[0].signal == "SIGUSR2"
    crash = attempts[1]
    assert (crash.rank, crash.how, crash.lines[-1]) == (1, "exit code 1", "the disk is on fire: (once)")
    assert runs.status(folder) == "finished"
    with pytest.raises(Refusal, match=f"{job} is not running"):
        Local().signal(job, "USR2")


def test_what_stops_a_job_and_those_behind_it_in_the_same_process_still_run():
    """One process for all, as a sweep has, since each takes seconds to load torch."""
    crash = submitted("crash", ["fails always"] * 9)
    bounded = submitted("bounded", ["fails"] * 9, ["run.requeue.crashes=0"])
    refused = submitted("refused", ["refuses no room on the disk", "finishes"])
    late = submitted("late", ["waits"], ["run.requeue.timeouts=0"], time_minutes=1, signal_lead_seconds=57)
    unwanted = submitted("unwanted", ["finishes"])
    stopped = submitted("stopped", ["waits", "finishes"])
    ids = start(crash, bounded, refused, late, unwanted, stopped)
    assert [job.rpartition("_")[2] for job in ids] == ["0", "1", "2", "3", "4", "5"]
    assert Local().states(ids)[ids[-1]].state == "queued"
    assert runs.status(stopped) == "queued"
    (unwanted / "cancelled").touch()
    Local().cancel([ids[4]])  # not its turn: no signal may reach the one whose turn it is

    until(busy(stopped, 1), 120)
    assert is_over(ids[0])
    (stopped / "cancelled").touch()
    Local().cancel([ids[5]])
    until(lambda: is_over(ids[5]))

    assert ends(crash) == [("crashed", 0, True), ("crashed", 0, False)]
    assert "crashed twice at the same step" in str(last(crash).stopped)
    assert ends(bounded) == [("crashed", 0, False)]
    assert last(bounded).stopped == "crashes: 1, and run.requeue.crashes allows 0"
    assert ends(refused) == [("refused", 0, False)]
    assert last(refused).lines == ["kilobatch: no room on the disk"]
    assert [(reason, requeued) for reason, _, requeued in ends(late)] == [("timed_out", False)]
    assert ends(unwanted) == []
    assert ends(stopped) == [("cancelled", 1, False)]
    found = [runs.status(folder) for folder in (crash, bounded, refused, late, unwanted, stopped)]
    assert found == ["failed", "failed", "failed", "failed", "cancelled", "cancelled"]


# A scheduler that begins a job anew by itself, with the same id and the restart counted.
AGAIN = """
import sys
from functools import partial
from pathlib import Path
from kilobatch.launch.jobs import attempt
from kilobatch.launch.jobs.signals import Signals
from kilobatch.launch.nodes import agent
from kilobatch.launch.schedulers.local import Local
from kilobatch.launch.schedulers.scheduler import Task
agent.run = partial(agent.run, module="scripted_job")
attempt.GLANCE = 0.2
task = Task(sys.argv[2], restart=int(sys.argv[3]), node=0, nodes=1, hosts=["here"])
sys.exit(attempt.run(Path(sys.argv[1]), task, Local(), Signals()).code)
"""


def again(folder: Path, job: str, restart: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", AGAIN, str(folder), job, str(restart)])


def test_attempts_that_were_killed_or_taken_for_dead_count_as_node_failures():
    folder = submitted("mine", ["waits", "waits", "waits", "finishes"], ["run.requeue.node_failures=2"])
    (job,) = start(folder)
    until(busy(folder, 1))
    os.kill(int(job.split("-")[1]), signal.SIGKILL)
    until(lambda: is_over(job))
    until(lambda: runs.status(folder) == "interrupted", 10)  # its last thread lets go of the run, soon after

    taken_for_dead = again(folder, job, 1)
    until(busy(folder, 2))
    successor = again(folder, job, 2)  # as where a node falls silent and lives on: the first saves and gives way
    assert taken_for_dead.wait(60) == 0
    until(busy(folder, 3))
    assert [one.from_step for one in ledger.read(folder)] == [0, 0, 0]
    assert ledger.checkpoint_step(folder) == 1
    assert [one.reason for one in ledger.read(folder)] == ["node_failed", "node_failed", None]
    assert runs.state(folder).status == "running"

    successor.kill()
    successor.wait()
    assert again(folder, job, 3).wait(60) == 1
    assert [one.reason for one in ledger.read(folder)] == ["node_failed"] * 3
    assert last(folder).stopped == "node failures: 3, and run.requeue.node_failures allows 2"
    assert runs.status(folder) == "failed"
