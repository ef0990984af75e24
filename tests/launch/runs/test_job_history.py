"""attempts.jsonl as kills leave it, and the decisions that follow from its attempts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.runs import job_history, requeue
from kilobatch.launch.runs.job_history import Attempt, Counts, JobFile, Reason
from kilobatch.launch.runs.requeue import RequeueOptions


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def begin(run: Path, restart: int = 0) -> int:
    return job_history.record_start(run, "7", restart, ["n0", "n1"], 4)


def test_an_attempt_from_its_beginning_to_its_end(run: Path):
    assert job_history.read_attempts(run) == []
    (run / "checkpoints" / "step-30").mkdir()
    (run / "checkpoints" / ".tmp-step-40").mkdir()
    assert begin(run) == 1
    (attempt,) = job_history.read_attempts(run)
    assert (attempt.job, attempt.nodes, attempt.workers, attempt.from_step) == ("7", ["n0", "n1"], 4, 30)
    assert attempt.ended is None
    (run / "metrics.jsonl").write_text('{"step": 41, "train/loss": 1}\n{"step": 42, "train/loss": 1}\n{"step": 4')
    job_history.record_end(
        run, 1, "crashed", rank=3, host="n1", how="exit code 1", lines=["boom"], requeued=True, stopped=None
    )
    assert begin(run, restart=1) == 2
    first, second = job_history.read_attempts(run)
    assert (first.reason, first.rank, first.host, first.how, first.lines) == (
        "crashed",
        3,
        "n1",
        "exit code 1",
        ["boom"],
    )
    assert first.step == 42
    assert first.requeued
    assert first.ended
    assert (second.restart, second.reason) == (1, None)


def test_a_requeue_that_was_refused(run: Path):
    begin(run)
    job_history.record_end(run, 1, "preempted", requeued=True)
    job_history.record_not_requeued(run, 1, "scontrol requeue: no")
    (attempt,) = job_history.read_attempts(run)
    assert not attempt.requeued
    assert attempt.stopped == "scontrol requeue: no"
    assert attempt.reason == "preempted"


def test_an_attempt_that_never_wrote_its_end_is_known_by_its_signal_or_as_a_node_failure(run: Path):
    begin(run)
    begin(run, restart=1)
    job_history.record_stop_request(run, 2, "SIGUSR2", "timed_out")
    begin(run, restart=2)
    attempts = job_history.read_attempts(run)
    assert [attempt.reason for attempt in attempts] == ["node_failed", "timed_out", None]
    assert attempts[0].how == "its first node went down"
    assert attempts[1].how == "killed after SIGUSR2, before it could end"
    assert job_history.count_ends(attempts) == Counts(timeouts=1, node_failures=1)


def test_an_attempt_taken_for_dead_writes_its_end_late(run: Path):
    begin(run)
    begin(run, restart=1)
    job_history.record_end(run, 1, "node_failed", how="its successor goes on", requeued=True)
    first, second = job_history.read_attempts(run)
    assert first.how == "its successor goes on"
    assert second.reason is None


def test_a_line_that_a_kill_left_half_written_costs_no_other(run: Path):
    begin(run)
    with (run / "attempts.jsonl").open("a") as file:
        file.write('{"attempt": 1, "event": "end')
    assert len(job_history.read_attempts(run)) == 1
    job_history.record_end(run, 1, "finished")
    assert job_history.read_attempts(run)[0].reason == "finished"
    lines = (run / "attempts.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert json.loads(lines[2])["event"] == "ended"


def test_an_attempt_after_a_damaged_line_has_a_number_of_its_own(run: Path):
    for restart in range(3):
        begin(run, restart)
    lines = (run / "attempts.jsonl").read_text().splitlines(keepends=True)
    (run / "attempts.jsonl").write_text("".join([lines[0], "damaged\n", lines[2]]))
    number = begin(run, restart=3)
    job_history.record_end(run, number, "crashed")
    assert [attempt.reason for attempt in job_history.read_attempts(run)] == ["node_failed", "node_failed", "crashed"]


def test_job_json_comes_back_equal_and_says_where_it_is_damaged(run: Path):
    assert job_history.read_job_file(run) is None
    job = JobFile(cluster="slurm", job_id="12_3", array_index=3, submitted=job_history.utc_now(), code="../code/001")
    job_history.write_job_file(run, job)
    assert job_history.read_job_file(run) == job
    (run / "job.json").write_text('{"cluster": "slurm", "job_id": 12}')
    with pytest.raises(UserError, match=r"job\.json is damaged \(job_id: .*remove it"):
        job_history.read_job_file(run)


def attempts(*ends: tuple[Reason, int]) -> list[Attempt]:
    fields = {"job": "7", "restart": 0, "began": "", "nodes": [], "workers": 1, "from_step": 0}
    return [Attempt(attempt=n, reason=reason, step=step, **fields) for n, (reason, step) in enumerate(ends, 1)]


@pytest.mark.parametrize(
    ("ends", "why"),
    [
        ([("crashed", 10)], None),
        ([("crashed", 10), ("crashed", 20), ("crashed", 30)], None),
        (
            [("crashed", 10), ("crashed", 20), ("crashed", 30), ("crashed", 40)],
            "crashes: 4, .* run.requeue.crashes allows 3",
        ),
        ([("crashed", 10), ("preempted", 10), ("crashed", 10)], "crashed twice at the same step.* 10"),
        ([("crashed", 10), ("crashed", 20), ("crashed", 10)], None),
        ([("timed_out", 10), ("timed_out", 10)], "two time limits in a row ended it at step 10.*--time"),
        ([("timed_out", 10), ("preempted", 10), ("timed_out", 10)], None),
        ([("preempted", 0)] * 50, None),
        ([("node_failed", n) for n in range(11)], "node failures: 11, .* run.requeue.node_failures allows 10"),
        ([("preempted", 5), ("refused", 0)], "refused"),
        ([("cancelled", 5)], "cancelled"),
    ],
)
def test_bounds_on_requeues(ends: list[tuple[Reason, int]], why: str | None):
    found = requeue.reason_to_stop(attempts(*ends), RequeueOptions())
    assert found is None if why is None else re.search(why, str(found))


def test_no_requeue_where_none_is_allowed():
    options = RequeueOptions(preemptions=0)
    assert (
        requeue.reason_to_stop(attempts(("preempted", 5)), options)
        == "preemptions: 1, and run.requeue.preemptions allows 0"
    )


def test_modules_of_jobs_load_no_torch():
    imports = [
        "from kilobatch.launch.jobs import attempt, local_queue, slurm_job",
        "from kilobatch.launch.runs import job_history, requeue, run_folder",
        "from kilobatch.launch.schedulers import local, scheduler, select, slurm",
    ]
    code = "; ".join(["import sys", *imports, "assert not {'torch', 'numba', 'submitit'} & sys.modules.keys()"])
    subprocess.run([sys.executable, "-c", code], check=True)
