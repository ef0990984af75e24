"""Jobs in the background of this machine, with real processes: signals, failures, limits of requeues, cancellation."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.jobs import local_queue
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import Attempt, JobFile
from kilobatch.launch.schedulers.local import Local
from tests.helpers.programs import PROGRAMS

# A job as `python -m kilobatch.launch.jobs.local_queue` runs it, but its workers are tests/programs/scripted_job.py.
LOCAL = """
import sys
from functools import partial
from kilobatch.launch.jobs import attempt, local_queue
from kilobatch.launch.nodes import agent
agent.run_node = partial(agent.run_node, module="scripted_job")
attempt.SUCCESSOR_CHECK_SECONDS, local_queue.REQUEUE_SECONDS = 0.2, 0.1
local_queue.main()
"""
CODE = Path(__file__).parents[3] / "src"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(local_queue, "_arguments", lambda folders: [sys.executable, "-c", LOCAL, *map(str, folders)])


def submitted(name: str, errands: list[str], changes: list[str] | None = None, **known: object) -> Path:
    recipe = resolve_recipe("demo", [f"run.name={name}", *(changes or [])])
    folder = run_folder.create_run(recipe.run, "demo", recipe.dump_yaml(), 2).absolute()
    (folder / "errands").write_text("\n".join(errands))
    job = JobFile(cluster="local", job_id="", workers_per_node=2, submitted=job_history.utc_now(), code="code/001")
    job_history.write_job_file(folder, job.model_copy(update=known))
    run_folder.set_status(folder, "queued", 2)
    return folder


def start(*folders: Path) -> list[str]:
    ids = local_queue.start(folders, CODE)
    for folder, job_id in zip(folders, ids, strict=True):
        job = job_history.read_job_file(folder)
        assert job is not None
        job_history.write_job_file(folder, job.model_copy(update={"job_id": job_id}))
    return ids


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def is_over(job: str) -> bool:
    return Local().states([job])[job].state == "gone"


def busy(folder: Path, attempt: int) -> Callable[[], bool]:
    """A function that returns whether both workers of the attempt have begun their errand."""
    return lambda: all((folder / f"at-{attempt}-{rank}").exists() for rank in (0, 1))


def ends(folder: Path) -> list[tuple[str | None, int | None, bool]]:
    return [(attempt.reason, attempt.step, attempt.requeued) for attempt in job_history.read_attempts(folder)]


def last(folder: Path) -> Attempt:
    return job_history.read_attempts(folder)[-1]


def test_a_job_goes_on_after_signals_and_a_crash_until_it_has_finished():
    folder = submitted("mine", ["waits", "fails (once)", "waits", "finishes"])
    (job,) = start(folder)
    assert run_folder.status(folder) in ("queued", "running")
    for attempt in (1, 3):
        until(busy(folder, attempt))
        assert Local().states([job])[job].state == "running"
        assert run_folder.status(folder) == "running"
        Local().signal(job, "USR2")
    until(lambda: is_over(job))
    assert ends(folder) == [
        ("preempted", 1, True),
        ("crashed", 1, True),
        ("preempted", 2, True),
        ("finished", 2, False),
    ]
    attempts = job_history.read_attempts(folder)
    assert [attempt.from_step for attempt in attempts] == [0, 1, 1, 2]
    assert [attempt.restart for attempt in attempts] == [0, 1, 2, 3]
    assert {attempt.job for attempt in attempts} == {job}
    assert attempts[0].signal == "SIGUSR2"
    crash = attempts[1]
    assert (crash.rank, crash.how, crash.lines[-1]) == (1, "exit code 1", "the disk is on fire: (once)")
    assert run_folder.status(folder) == "finished"
    with pytest.raises(UserError, match=f"{job} is not running"):
        Local().signal(job, "USR2")


def test_jobs_that_end_for_each_reason_do_not_stop_those_after_them():
    """All jobs run in one process, as those of a sweep do, since each process takes seconds to load torch."""
    crash = submitted("crash", ["fails always"] * 9)
    bounded = submitted("bounded", ["fails"] * 9, ["run.requeue.crashes=0"])
    refused = submitted("refused", ["refuses no room on the disk", "finishes"])
    late = submitted("late", ["waits"], ["run.requeue.timeouts=0"], time_minutes=1, signal_lead_seconds=57)
    unwanted = submitted("unwanted", ["finishes"])
    stopped = submitted("stopped", ["waits", "finishes"])
    ids = start(crash, bounded, refused, late, unwanted, stopped)
    assert [job.rpartition("_")[2] for job in ids] == ["0", "1", "2", "3", "4", "5"]
    assert Local().states(ids)[ids[-1]].state == "queued"
    assert run_folder.status(stopped) == "queued"
    (unwanted / "cancelled").touch()
    Local().cancel([ids[4]])  # it has not begun: no signal may reach the job that runs now

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
    found = [run_folder.status(folder) for folder in (crash, bounded, refused, late, unwanted, stopped)]
    assert found == ["failed", "failed", "failed", "failed", "cancelled", "cancelled"]


# A job as a scheduler starts it again by itself: with the same id, and the number of restarts.
RESTARTED = """
import sys
from functools import partial
from pathlib import Path
from kilobatch.launch.jobs import attempt
from kilobatch.launch.jobs.signals import Signals
from kilobatch.launch.nodes import agent
from kilobatch.launch.schedulers.local import Local
from kilobatch.launch.schedulers.scheduler import Task
agent.run_node = partial(agent.run_node, module="scripted_job")
attempt.SUCCESSOR_CHECK_SECONDS = 0.2
task = Task(sys.argv[2], restart=int(sys.argv[3]), node=0, nodes=1, hosts=["here"])
sys.exit(attempt.run_attempt(Path(sys.argv[1]), task, Local(), Signals()).code)
"""


def restart_job(folder: Path, job: str, restart: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", RESTARTED, str(folder), job, str(restart)])


def test_attempts_that_were_killed_or_taken_for_dead_count_as_node_failures():
    folder = submitted("mine", ["waits", "waits", "waits", "finishes"], ["run.requeue.node_failures=2"])
    (job,) = start(folder)
    until(busy(folder, 1))
    os.kill(int(job.split("-")[1]), signal.SIGKILL)
    until(lambda: is_over(job))
    until(lambda: run_folder.status(folder) == "interrupted", 10)  # its last thread releases the run soon after

    taken_for_dead = restart_job(folder, job, 1)
    until(busy(folder, 2))
    # As after a node that did not answer, but goes on: the first attempt saves, and leaves the run to the second.
    successor = restart_job(folder, job, 2)
    assert taken_for_dead.wait(60) == 0
    until(busy(folder, 3))
    assert [attempt.from_step for attempt in job_history.read_attempts(folder)] == [0, 0, 0]
    assert job_history.checkpoint_step(folder) == 1
    assert [attempt.reason for attempt in job_history.read_attempts(folder)] == ["node_failed", "node_failed", None]
    assert run_folder.read_state(folder).status == "running"

    successor.kill()
    successor.wait()
    assert restart_job(folder, job, 3).wait(60) == 1
    assert [attempt.reason for attempt in job_history.read_attempts(folder)] == ["node_failed"] * 3
    assert last(folder).stopped == "node failures: 3, and run.requeue.node_failures allows 2"
    assert run_folder.status(folder) == "failed"
