"""A finished run that gets more epochs, one that is signalled at its end, and a branch end as one never stopped."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kilobatch.launch.runs import run_folder
from kilobatch.launch.runs.final_evaluation import PartResult, read_final_evaluation
from kilobatch.launch.runs.identity import read_identity
from kilobatch.launch.runs.job_history import JobFile, write_job_file
from kilobatch.launch.worker import main as worker
from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.monitor.monitor import TIMINGS
from tests.helpers.in_process_runs import copy_of, kilobatch, same_bits, stop_at, train_tiny, weights
from tests.helpers.process_groups import run_ranks

CONSTANT = ("schedule.name=constant", "run.log_every=2")


def curves(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in lines]


def files(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def extended(made: Path, whole: Path, folder: Path) -> dict[str, Any]:
    """5 epochs after 3, by one command; then the same once more."""
    run = copy_of(made, folder)
    ended = kilobatch("resume", str(run), "schedule.epochs=5")
    record, again = read_final_evaluation(run), kilobatch("resume", str(run))
    former = json.loads((run / "evaluation-step-00000006.json").read_text())
    return {
        "code": ended.code,
        "printed": ended.printed,
        "same": (same_bits(weights(run), weights(whole)), curves(run) == curves(whole)),
        "evaluated": (former["step"], record and record.step, run_folder.read_state(run).evaluation),
        "again": (again.code, again.printed),
    }


def killed_before_it_began(made: Path, folder: Path) -> int:
    """The extension is written, and its launcher killed before state.json says that it runs."""
    run = copy_of(made, folder)
    ended = kilobatch("resume", str(run), "schedule.epochs=4", "--workers", "2")  # whose workers are not started
    assert ended.code == 130
    run_folder.set_status(run, "finished", 1)
    return kilobatch("resume", str(run)).code


def signalled(made: Path, folder: Path) -> dict[str, Any]:
    """A stop signal where no step is left to train, and one in the last step; each run then goes on."""
    past, last = copy_of(made, folder / "past"), copy_of(made, folder / "last")
    stop_at(past, 3)
    stop_at(last, 5)
    found: dict[str, Any] = {}
    for run, words in ((past, ["schedule.epochs=1"]), (last, [])):
        stopped = kilobatch("resume", str(run), *words, signalled=True)
        state, evaluated = run_folder.read_state(run).status, (run / "evaluation.json").exists()
        steps = [*list_checkpoints(run / "checkpoints")]
        done = kilobatch("resume", str(run))
        record = read_final_evaluation(run)
        end = (done.code, run_folder.read_state(run).status, record and record.step)
        found[run.parent.name] = (stopped.code, state, evaluated, steps[-1], end)
    return found | {"same": same_bits(weights(last), weights(made))}


def asked_again(made: Path, folder: Path) -> dict[str, Any]:
    """An evaluation that has failed is asked again: by 3 workers, over which no batch divides, and by one."""
    run = copy_of(made, folder)
    record, engine = read_final_evaluation(run), worker.Engine
    assert record is not None
    record.parts["knn"] = PartResult(state="failed", why="killed")
    record.write(run)
    run_folder.set_status(run, "finished", 1, "failed")
    by_three = kilobatch("eval", str(run), "--workers", "3")
    job = JobFile(cluster="slurm", job_id="7", nodes=4, workers_per_node=2, submitted="", code="")
    write_job_file(run, job)
    by_node = kilobatch("eval", str(run)).starts
    (run / "job.json").unlink()
    worker.Engine = None  # pyright: ignore[reportAttributeAccessIssue]  # nothing is trained
    try:
        ended = kilobatch("eval", str(run))
    finally:
        worker.Engine = engine
    damaged = copy_of(run, folder.with_name("damaged"))
    run_folder.set_status(damaged, "finished", 1, "failed")
    record.write(damaged)
    shard = next((damaged / "checkpoints" / "step-00000006").glob("rank-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    refused = kilobatch("eval", str(damaged))
    return {
        "damaged": (refused.printed, run_folder.read_state(damaged).evaluation),
        "by three": (by_three.starts, by_three.printed),
        "by node": by_node,
        "ended": (ended.code, run_folder.read_state(run).evaluation),
        "same": (curves(run) == curves(made), read_final_evaluation(run) == read_final_evaluation(made)),
        "printed": ended.printed,
    }


def branched(whole: Path, folder: Path) -> dict[str, Any]:
    """A branch at step 3, which goes on, and one at step 2 with another rate."""
    before = files(whole)
    made, changed = folder / "same", folder / "changed"
    first = kilobatch("branch", str(whole), str(made), "--from", "3")
    start = {name: (made / name).exists() for name in ("tensorboard", "evaluation.json", "job.json", ".lock")}
    inodes = [(run / "checkpoints/step-00000003/checkpoint.json").stat().st_ino for run in (whole, made)]
    state, steps = run_folder.read_state(made).status, [*list_checkpoints(made / "checkpoints")]
    logged = curves(made)[-1]["step"]
    ended = kilobatch("resume", str(made))
    other = kilobatch("branch", str(whole), str(changed), "--from", "2", "optimizer.lr=0.02", "seed=3")
    untouched = files(whole) == before
    identities = read_identity(made), read_identity(changed)
    final = kilobatch("resume", str(changed))
    assert identities[0] and identities[1] and identities[0].branched_from
    return {
        "codes": (first.code, ended.code, other.code, final.code),
        "printed": (first.printed, other.printed),
        "start": start,
        "linked": inodes[0] == inodes[1],
        "state": (state, steps, logged),
        "same": (same_bits(weights(made), weights(whole)), curves(made) == curves(whole)),
        "other": same_bits(weights(changed), weights(whole)),
        "untouched": untouched,
        "origin": (str(identities[0].branched_from.run), identities[0].branched_from.step),
        "accepted": [(entry.step, [change.name for change in entry.changes]) for entry in identities[1].accepted],
    }


def refused(whole: Path, stopped: Path, folder: Path) -> dict[str, str]:
    empty = copy_of(whole, folder / "empty")
    stop_at(empty, 0)
    edited = copy_of(stopped, folder / "edited")
    recipe = edited / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("lr: 0.003", "lr: 0.004"))
    moved = copy_of(stopped, folder / "moved")
    (moved.parent / "train.npz").rename(moved.parent / "other.npz")
    words = {
        "taken": [str(whole), str(stopped)],
        "no step": [str(whole), str(folder / "new"), "--from", "99"],
        "nothing": [str(empty), str(folder / "new")],
        "shape": [str(whole), str(folder / "new"), "encoder.width=4"],
        "edited": [str(edited), str(folder / "new")],
        "missing": [str(moved), str(folder / "new"), "optimizer.lr=0.1"],
        "name": [str(whole), str(folder / "a b")],
    }
    said: dict[str, str] = {}
    for name, arguments in words.items():
        before = {path.name for path in folder.iterdir()}
        ended = kilobatch("branch", *arguments)
        assert ended.code == 2 and {path.name for path in folder.iterdir()} == before, (name, ended.printed)
        said[name] = ended.printed
    assert kilobatch("branch", str(moved), str(folder / "new")).code == 0  # without changes no data are needed
    return said


def scenarios(folder: Path) -> dict[str, Any]:
    os.environ["KILOBATCH_CACHE"] = str(folder / "cache")
    made, whole = train_tiny(folder / "made", *CONSTANT), train_tiny(folder / "whole", *CONSTANT, "schedule.epochs=5")
    stopped = copy_of(made, folder / "stopped")
    stop_at(stopped, 3)
    (folder / "refused").mkdir()
    return {
        "extended": extended(made, whole, folder / "extended"),
        "signalled": signalled(made, folder / "signalled"),
        "killed": killed_before_it_began(made, folder / "killed"),
        "asked again": asked_again(made, folder / "again"),
        "branched": branched(whole, folder / "branched"),
        "refused": refused(whole, stopped, folder / "refused"),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(1, scenarios, tmp_path_factory.mktemp("runs"), timeout=240.0)[0]


def test_a_finished_run_gets_more_epochs(found: dict[str, Any]):
    """At a constant rate it ends with the bits of a run of so many epochs, and with its curves."""
    of = found["extended"]
    assert (of["code"], of["same"]) == (0, (True, True))
    assert "schedule.epochs: 3, now 5" in of["printed"]
    assert "constant over 5 instead of 3 epochs: the learning rate at step 6 stays at 0.003" in of["printed"]
    assert of["evaluated"] == (6, 10, "finished")
    assert of["again"][0] == 2 and "has finished; nothing is left to resume" in of["again"][1]
    assert found["killed"] == 0


def test_signals_are_heeded_at_the_end_and_past_it(found: dict[str, Any]):
    """Nothing is evaluated, the run is one that was stopped, and the next resume evaluates."""
    of = found["signalled"]
    assert of["past"] == (130, "interrupted", False, 3, (0, "finished", 3))
    assert of["last"] == (130, "interrupted", False, 6, (0, "finished", 6))
    assert of["same"]


def test_a_failed_evaluation_is_asked_again_by_workers_that_do_not_train(found: dict[str, Any]):
    again = found["asked again"]
    assert again["by three"][0] == [3], again["by three"][1]
    assert "whole checkpoint of" in again["damaged"][0] and "is step-00000005, and its train" in again["damaged"][0]
    assert again["damaged"][1] == "failed"
    assert again["by node"] == [2], "those of one node of the job"
    assert again["ended"] == (0, "finished") and again["same"] == (True, True), again["printed"]
    assert "evaluating step-00000006: what has no result yet" in again["printed"]


def test_a_branch_is_a_run_of_its_own(found: dict[str, Any]):
    of = found["branched"]
    assert of["codes"] == (0, 0, 0, 0) and of["untouched"] and of["linked"]
    assert of["start"] == dict.fromkeys(("tensorboard", "evaluation.json", "job.json", ".lock"), False)
    assert of["state"] == ("interrupted", [3], 2)
    assert (of["same"], of["other"]) == ((True, True), False)
    assert of["origin"][0].endswith("whole/r") and of["origin"][1] == 3
    assert of["accepted"] == [(2, ["optimizer.lr", "run.seed"])]
    assert "go on with: kilobatch resume" in of["printed"][0] and "changed from step 2 on:" in of["printed"][1]


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("taken", "exists; a branch is a new run"),
        ("no step", "--from 99: "),
        ("nothing", "has no checkpoint yet, so there is nothing to branch from"),
        ("shape", "can go on with encoder.width: 2, now 4"),
        ("edited", "optimizer.lr: 0.003, now 0.004\n"),
        ("missing", "train.npz does not exist; put it back, or, where the data have moved: kilobatch branch"),
        ("name", "is no name for a run"),
    ],
)
def test_a_branch_is_refused_before_anything_is_made(case: str, says: str, found: dict[str, Any]):
    assert says in found["refused"][case]
