"""Endings of real runs: evaluators that fail leave a finished training, and a NaN names the way back."""

import json
import os
import signal
from pathlib import Path

import numpy as np

from kilobatch.data.beton import verify_beton
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.digits import Digits
from kilobatch.launch.runs import run_folder
from kilobatch.launch.runs.final_evaluation import FinalEvaluation, read_final_evaluation
from tests.helpers.real_runs import TINY, Launcher, command, wait_for, workers_of

SHORT = [*TINY, "data.batch=130", "schedule.epochs=2", "schedule.warmup_epochs=1", "run.name=ends"]


def record_of(run: Path) -> FinalEvaluation:
    record = read_final_evaluation(run)
    assert record is not None
    return record


def last_line(launcher: Launcher) -> str:
    launcher.printed.seek(0)
    return launcher.printed.read().decode().splitlines()[-1]


def final_values(run: Path) -> list[str]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [name for line in lines for name in line if name.startswith("final/")]


def test_evaluators_that_fail_leave_a_finished_training(tmp_path: Path) -> None:
    """One is killed, one raises an exception; all others run, and both can be asked again."""
    run = tmp_path / "ends"
    options = ["evaluate.final=[picture,linear,knn]", "evaluate.linear.epochs=1000000", "evaluate.linear.batch=64"]
    first = command("train", *SHORT, *options, f"run.folder={tmp_path}", "--workers", "1")
    wait_for((run / "pictures" / "views.png").exists, first)
    (run / "pictures" / "neighbours.png").mkdir()  # so that no picture can be written there
    wait_for(lambda: (run / "evaluation.json").exists() and record_of(run).parts["linear"].state == "running", first)
    workers = workers_of(first)
    os.kill(workers[0].pid, signal.SIGKILL)
    first.ends(0, within=120)
    assert [part.state for part in record_of(run).parts.values()] == ["failed", "failed", "finished", "finished"]
    state = run_folder.read_state(run)
    assert (state.status, state.evaluation) == ("finished", "failed")
    assert "picture: IsADirectoryError" in last_line(first)
    assert "; linear: rank 0 ended by SIGKILL" in last_line(first)
    assert final_values(run) == ["final/knn/top1"]

    (run / "pictures" / "neighbours.png").rmdir()
    again = command("eval", str(run), "evaluate.linear.epochs=1", "--workers", "1")
    again.ends(0, within=120)
    assert run_folder.read_state(run).evaluation == "finished"
    assert final_values(run) == ["final/linear/top1", "final/linear/top5", "final/knn/top1"]
    assert (run / "pictures" / "neighbours.png").is_file()


def test_an_evaluation_that_fails_on_one_of_two_ranks(tmp_path: Path) -> None:
    """A damaged test image: the rank that reads it leaves, as the other one waits for it, and the training is saved."""
    beton = tmp_path / "test.beton"
    convert(Digits("test"), beton, progress=False)
    content = np.fromfile(beton, np.uint8)
    content[np.flatnonzero(content[: verify_beton(beton).alloc_table_ptr])[-1]] ^= 1  # of the last image
    content.tofile(beton)
    options = [f"data.test={beton}", "evaluate.every_epochs=0", f"run.folder={tmp_path}", "--workers", "2"]
    launcher = command("train", *SHORT, *options)
    launcher.ends(0, within=240)
    run = tmp_path / "ends"
    state, why = run_folder.read_state(run), record_of(run).parts["knn"].why
    assert (state.status, state.evaluation) == ("finished", "failed")
    assert why.startswith("the evaluation 'knn' failed: ") and "test.beton" in why and "\n" not in why
    said = launcher.last_output()
    assert "Traceback" not in said and f"ask again with: kilobatch eval {run}" in said
    assert (run / "checkpoints" / "step-00000022").is_dir()


def test_a_loss_that_is_not_finite_names_the_way_back(tmp_path: Path) -> None:
    """The update at 1e30 leaves finite weights, of which a checkpoint is made; the next loss is no number."""
    huge = ["optimizer.name=sgd", "optimizer.lr=1e30", "checkpoint.every_steps=1", "evaluate.final=[]"]
    launcher = command("train", *SHORT, *huge, f"run.folder={tmp_path}", "--workers", "1")
    launcher.ends(1, within=120)
    launcher.printed.seek(0)
    said = launcher.printed.read().decode()
    assert "step-00000001 (passed over: step-00000002: its weights gave what is not finite)" in said
    assert f"go on from it with: kilobatch resume {tmp_path / 'ends'} --from 1\n" in said
    assert "Traceback" not in said and "is good" not in said
