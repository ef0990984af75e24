"""`kilobatch status`: its table and JSON for runs in every state, without a scheduler."""

import io
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from kilobatch.launch.cli.reports.status import render
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.final_evaluation import FinalEvaluation, PartResult
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.runs.overview import overview
from kilobatch.launch.runs.run_folder import RunOptions
from kilobatch.trainer.monitor.progress_file import Progress
from tests.launch.conftest import CommandResult

Kilobatch = Callable[..., CommandResult]


def make(name: str, state: run_folder.Status, workers: int = 4, folder: str = "runs", **progress: float) -> Path:
    run = run_folder.create_run(RunOptions(name=name, folder=folder), "demo", "run: {}\n", workers)
    run_folder.set_status(run, state, workers)
    if progress:
        Progress.model_validate({"steps": 400, "epochs": 8, "time": time.time()} | progress).write(run)
    return run


def job(run: Path, **known: str) -> None:
    given = {"cluster": "slurm", "job_id": "17", "nodes": 2, "workers_per_node": 2, "submitted": job_history.utc_now()}
    job_history.write_job_file(run, JobFile.model_validate(given | {"code": "code/001"} | known))


def failed(run: Path) -> None:
    """Writes the attempts of a job that was preempted once, and whose rank 3 raised in the second attempt."""
    first = job_history.record_start(run, "17", 0, ["n0", "n1"], 4)
    job_history.record_stop_request(run, first, "SIGUSR2", "preempted")
    job_history.record_end(run, first, "preempted", requeued=True)
    second = job_history.record_start(run, "17", 1, ["n0", "n2"], 4)
    lines = ["Traceback (most recent call last):", "ValueError: the disk of rank 3 is on fire", ""]
    job_history.record_end(
        run, second, "crashed", rank=3, host="n2", how="exit code 1", lines=lines, stopped="no more crashes"
    )


def rows(*given: str) -> dict[str, dict[str, object]]:
    return {row.run: row.model_dump() for row in overview(given).rows}


def test_each_state_is_shown(kilobatch: Kilobatch) -> None:
    running = make("running", "running", step=100, epoch=2.0, loss=1.23456, knn=0.875, images_per_second=12345.0)
    (running / "checkpoints" / "step-00000090").mkdir()
    os.utime(running / "checkpoints" / "step-00000090", (time.time() - 130, time.time() - 130))
    job(make("crashed", "failed", step=300, epoch=6.0, loss=0.5))
    failed(Path("runs/crashed"))
    make("whole", "finished")
    with run_folder.locked(running):
        result = kilobatch("status")
    assert (result.code, result.err) == (0, "")
    header, *lines = result.out.splitlines()
    table = {line.split()[0]: line for line in lines}
    for word in ("running", "1×4", "2.0/8", "100/400", "1.2346", "87.5%", "12,345", "90, 2m ago"):
        assert word in table["running"]
    for word in ("failed", "17", "2×2", "300/400", "1/0/0/0"):
        assert word in table["crashed"]
    assert "finished" in table["whole"]
    assert lines[-1] == (
        "crashed: rank 3 on n2: crashed, exit code 1, no more crashes: ValueError: the disk of rank 3 is on fire"
    )
    assert "data wait" not in header, "a column without any value is left out"


def test_json_has_the_same(kilobatch: Kilobatch) -> None:
    job(make("crashed", "failed", step=300, epoch=6.0, loss=0.5))
    failed(Path("runs/crashed"))
    (row,) = json.loads(kilobatch("status", "--json").out)
    assert (row["state"], row["rank"], row["host"]) == ("failed", 3, "n2")
    assert row["requeues"] == {"preemptions": 1, "timeouts": 0, "crashes": 0, "node_failures": 0}
    assert (row["step"], row["steps"], row["knn"], row["job"]) == (300, 400, None, "17")
    assert "leave --watch out" in kilobatch("status", "--json", "--watch").err


def test_a_killed_launcher_leaves_an_interrupted_run(kilobatch: Kilobatch) -> None:
    make("killed", "running", step=10, epoch=0.2, seconds_left=100.0)
    assert rows()["killed"]["state"] == "interrupted"
    assert rows()["killed"]["eta"] is None


def test_eta_counts_down(kilobatch: Kilobatch, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    run = make("demo", "running", step=10, epoch=0.2, seconds_left=100.0, time=now - 30)
    with run_folder.locked(run):
        assert rows()["demo"]["eta"] == pytest.approx(70)


def test_a_scheduler_that_does_not_answer_is_named(kilobatch: Kilobatch, monkeypatch: pytest.MonkeyPatch) -> None:
    job(make("waits", "queued"))
    monkeypatch.setenv("PATH", "/nonexistent")
    result = kilobatch("status")
    assert result.code == 0
    assert "queued" in result.out
    assert "there is no squeue here" in result.out
    assert "wrote last" in result.out


def test_long_ended_runs_are_left_out(kilobatch: Kilobatch) -> None:
    make("new", "finished")
    old = make("old", "finished")
    state = run_folder.read_state(old)
    past = (datetime.now(UTC) - timedelta(days=8)).isoformat(timespec="seconds")
    (old / "state.json").write_text(state.model_copy(update={"started": past, "updated": past}).model_dump_json())
    result = kilobatch("status").out
    assert "new" in result
    assert "1 more ended over a week ago (--all)" in result
    assert [line.split()[0] for line in kilobatch("status", "--all").out.splitlines()[1:]] == ["old", "new"]
    assert kilobatch("status", "old").out.splitlines()[1].startswith("old")


DAMAGE = {"cut short": '{"status": "fini', "no text": "\0\xff" * 40, "a list": "[1, 2]\n", "a number": "7\n"}
RECORDS = ("state.json", "job.json", "attempts.jsonl", "recipe.yaml")


def test_a_damaged_record_is_named_and_hides_no_other(kilobatch: Kilobatch) -> None:
    make("good", "finished")
    cases = [(record, text) for record in RECORDS for text in DAMAGE.values()]
    cases.remove(("attempts.jsonl", DAMAGE["cut short"]))  # as a kill leaves it
    cases += [("state.json", '{"status": "new", "pid": 1, "host": "a", "workers": 1, "started": "x", "updated": "y"}')]
    cases += [("attempts.jsonl", '{"event": "began", "attempt": "one"}'), ("attempts.jsonl", '{"event": "lost"}')]
    cases += [("recipe.yaml", "data: {train: digits}\nmethod: {name: simclr}\n"), ("recipe.yaml", "data: 1\nrun: {}")]
    for number, (record, text) in enumerate(cases):
        run = make(f"bad-{number}", "running")
        job(run)
        (run / record).write_text(text, "latin-1")
    for number, record in enumerate(RECORDS[:3]):  # what cannot be read at all
        run = make(f"odd-{number}", "finished")
        (run / record).unlink(missing_ok=True)
        (run / record).mkdir()
    odd = make("odd", "finished", step=3, epoch=1.0)
    (odd / "progress.json").unlink()
    (odd / "progress.json").mkdir()
    result = kilobatch("status")
    assert result.code == 0
    states = {line.split()[0]: line.split()[1] for line in result.out.splitlines()}
    assert (states["good"], states["odd"]) == ("finished", "finished")
    for number, (record, text) in enumerate(cases):
        assert states[f"bad-{number}"] == "damaged", (record, text)
        assert f"bad-{number}: runs/bad-{number}/{record} is damaged (" in result.out
    for number, record in enumerate(RECORDS[:3]):
        assert f"odd-{number}: runs/odd-{number}/{record} cannot be read: something else is in its place" in result.out


def test_a_half_line_of_attempts_is_no_damage(kilobatch: Kilobatch) -> None:
    run = make("killed", "failed")
    failed(run)
    with (run / "attempts.jsonl").open("a") as file:
        file.write('{"attempt": 3, "event": "beg')
    assert rows()["killed"]["state"] == "failed"


def test_no_age_is_negative_where_clocks_differ(kilobatch: Kilobatch, monkeypatch: pytest.MonkeyPatch) -> None:
    week, now = 7 * 86400.0, time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    for name, ahead in (("ahead", week), ("behind", -week), ("alike", 0.0)):
        then = now + ahead
        run = make(name, "running", step=360, epoch=1.0, time=then, seconds_left=100.0)
        (run / "checkpoints" / "step-360").mkdir()
        os.utime(run / "checkpoints" / "step-360", (then, then))
    with run_folder.locked(Path("runs/ahead")), run_folder.locked(Path("runs/behind")):
        result = kilobatch("status")
        shown = rows()
    table = {line.split()[0]: line for line in result.out.splitlines()}
    assert "-" not in table["ahead"].replace("–", "") and table["ahead"].rstrip().endswith(" 360")
    assert "360, 7d00h ago" in table["behind"] and "360, 0s ago" in table["alike"]
    assert "ahead: written by a clock ahead of this machine's; ages are left out" in result.out
    assert (shown["ahead"]["seen"], shown["ahead"]["checkpoint_age"], shown["ahead"]["eta"]) == (None, None, 100.0)
    assert shown["behind"]["eta"] == 100.0, "it has not come to its end for a week"


def test_no_run_seems_old_where_this_clock_is_ahead(kilobatch: Kilobatch) -> None:
    for name, days in (("new", 20), ("old", 30)):
        state = run_folder.read_state(make(name, "finished"))
        past = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
        text = state.model_copy(update={"started": past, "updated": past}).model_dump_json()
        Path("runs", name, "state.json").write_text(text)
    assert list(rows()) == ["new"]


def test_json_is_json_where_the_loss_is_no_number(kilobatch: Kilobatch) -> None:
    run = make("diverged", "failed", step=3, epoch=1.0)
    (run / "progress.json").write_text((run / "progress.json").read_text().replace('"loss": null', '"loss": NaN'))

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(kilobatch("status", "--json").out, parse_constant=refuse)[0]["loss"] is None


def test_a_copy_shows_as_one_and_cancels_nothing(kilobatch: Kilobatch, monkeypatch: pytest.MonkeyPatch) -> None:
    original = make("a", "running")
    job(original)
    shutil.copytree(original, "runs/b")
    Path("bin").mkdir()
    for name in ("squeue", "scancel", "sacct"):
        Path("bin", name).write_text(f"#!/bin/sh\necho $0 $* >> {Path.cwd()}/calls\necho '17|RUNNING|n0|1:00|None'\n")
        Path("bin", name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path.cwd()}/bin:/usr/bin:/bin")
    copy = rows()["b"]
    assert (copy["state"], copy["job"], rows()["a"]["state"]) == ("interrupted", None, "running")
    assert copy["problem"] == f"a copy of {original.resolve()}, whose job 17 is not its own"
    Path("calls").unlink()
    result = kilobatch("cancel", "b")
    assert (result.code, result.out) == (2, "")
    assert f"nothing to cancel; kilobatch cancel {original.resolve()} ends that job" in result.err
    assert "kilobatch resume runs/b makes the copy a run of its own" in result.err
    assert not Path("calls").exists(), "no command of SLURM was run"
    assert "running" in kilobatch("logs", "a").out and "interrupted" in kilobatch("logs", "b").out
    original.rename("runs/c")
    assert (rows()["c"]["state"], rows()["c"]["job"]) == ("running", "17"), "a folder that was moved is no copy"
    assert "scancel 17 ends that job" in kilobatch("cancel", "b").err


def test_a_sweep_is_ranked_by_top1_or_knn_then_loss(kilobatch: Kilobatch) -> None:
    for name, knn, loss in (("0-lr-1", 0.5, 1.0), ("1-lr-2", 0.7, 3.0)):
        make(name, "finished", folder="runs/lr", step=1, epoch=1.0, knn=knn, loss=loss)
    for name, loss in (("2-lr-3", 0.2), ("3-lr-4", 0.1)):
        make(name, "finished", folder="runs/lr", step=1, epoch=1.0, loss=loss)
    make("4-lr-5", "new", folder="runs/lr")
    make("alone", "new")
    listed = kilobatch("status", "lr", "--best-first").out.splitlines()[1:]
    assert [line.split()[0] for line in listed] == [
        f"lr/{n}" for n in ("1-lr-2", "0-lr-1", "3-lr-4", "2-lr-3", "4-lr-5")
    ]
    for name, top1 in (("0", 0.3), ("1", 0.4)):
        make(name, "finished", folder="runs/fine", step=1, epoch=1.0, knn=0.9 - top1, top1=top1)
    header, *listed = kilobatch("status", "fine", "--best-first").out.splitlines()
    assert "top-1" in header and [line.split()[0] for line in listed] == ["fine/1", "fine/0"] and "40.0%" in listed[0]
    assert set(rows("lr")) == set(rows("runs/lr"))
    assert len(rows()) == 8
    result = kilobatch("status", "ls")
    assert result.code == 2
    assert "there is no run 'ls'; known: alone, fine, lr" in result.err


def test_a_narrow_terminal_gets_fewer_columns(kilobatch: Kilobatch) -> None:
    job(make("crashed", "failed", step=300, epoch=6.0, loss=0.5, images_per_second=10.0, data_wait=0.1))
    failed(Path("runs/crashed"))
    for width in (60, 80, 200):
        console = Console(width=width, file=io.StringIO())
        with console.capture() as captured:
            console.print(render(overview([]), console))
        header, row, *_ = captured.get().splitlines()
        assert len(header) <= width
        assert "crashed" in row
        assert "300/400" in row
        assert ("data wait" in header) == (width == 200)


def test_an_evaluation_that_failed_is_told_of_a_finished_run(kilobatch: Kilobatch) -> None:
    run = make("whole", "finished")
    run_folder.set_status(run, "finished", 1, "failed")
    parts = {"knn": PartResult(state="finished"), "picture": PartResult(state="failed", why="ended by SIGSEGV")}
    FinalEvaluation(step=9, parts=parts).write(run)
    told = kilobatch("status").out.splitlines()[-1]
    assert told.startswith("whole: trained, but its evaluation failed: picture: ended by SIGSEGV; ask again with: ")
    assert rows()["whole"]["state"] == "finished"


def test_nothing_to_show(kilobatch: Kilobatch) -> None:
    assert kilobatch("status").out == "no runs here yet (kilobatch train, or submit)\n"
    result = kilobatch("status", "demo")
    assert result.code == 2
    assert "there is no run 'demo'" in result.err


def test_nothing_is_cut_off_on_a_very_narrow_terminal(kilobatch: Kilobatch) -> None:
    long = "simclr_imagenet-20261129-101500"
    job(make(long, "queued", step=12345, epoch=6.0, loss=0.123456, knn=0.5))
    make("short", "interrupted", step=7, epoch=6.0, loss=0.5, knn=0.25)
    found = overview([])
    found.rows[0].waiting = "ReqNodeNotAvail"
    for width in (40, 60, 80):
        console = Console(width=width, file=io.StringIO())
        with console.capture() as captured:
            console.print(render(replace(found, notes=[]), console))
        header, *lines = captured.get().splitlines()
        assert max(map(len, (header, *lines))) <= width and "…" not in captured.get()
        assert long in "".join(line.split("  ")[0].strip() for line in lines)
        assert "12345/400" in captured.get()
