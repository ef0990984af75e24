"""Damage to the files of a run, of each kind at random places: each command ends with what is right or with one message
that names the file, the other runs stay in sight, and no training ends with other weights.

The seed is stated. Workers run in this process, and train for one step.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from kilobatch.data.errors import UserError
from kilobatch.launch.jobs.cluster import cluster_again
from kilobatch.launch.processes import launcher
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.trainer.checkpoint.reader import open_saved
from tests.helpers import damage, real_runs, worker_in_process
from tests.helpers.damage import Damage, put_back
from tests.launch.conftest import CommandResult

SEED = 13
RUN = Path("runs/run")
LAST, BEFORE = 9, 8  # steps of the newest checkpoints: of the run once it has finished, and now
RECIPE = ["demo", "data.train=npz:train.npz", "data.test=npz:test.npz", "data.batch=8", "data.views.size=8"]
RECIPE += ["encoder.width=2", "data.threads=1", "schedule.epochs=3", "schedule.warmup_epochs=1", "run.log_every=1"]
RECIPE += ["evaluate.knn.k=3", "evaluate.every_epochs=2", "evaluate.final=[knn]"]
RECIPE += ["checkpoint.every_steps=2", "checkpoint.keep_last=9"]
NEWEST = f"checkpoints/step-{BEFORE:08d}"
FINETUNE = [*RECIPE, f"method={{name: finetune, start: {RUN / NEWEST}}}", "data.views.count=1", "run.name=tuned"]
FINETUNE += ["evaluate.every_epochs=0", "evaluate.final=[]", "schedule.epochs=1", "--workers", "1"]
# by file: how its values are read, where it has some
JSON_FILES = dict.fromkeys(("state.json", "job.json", "identity.json", "evaluation.json", "progress.json"), json.loads)
FILES: dict[str, Callable[[str], Any] | None] = {"recipe.yaml": yaml.safe_load, "cluster.yaml": yaml.safe_load}
FILES |= {**JSON_FILES, f"{NEWEST}/checkpoint.json": json.loads}
LOGS = ("metrics.jsonl", "evaluations.jsonl", "logs/rank-0.log", "tensorboard/events")
FILES |= dict.fromkeys(("attempts.jsonl", *LOGS, f"{NEWEST}/rank-00000-of-00001.safetensors"))
READING = [("status",), ("status", "run", "--json"), ("logs", "run"), ("cancel", "run")]
WRITING = [("resume", "run", "--workers", "1"), ("eval", "run", "--knn"), ("train", *FINETUNE)]
WRITING += [("export", "run", "e.safetensors", "--force")]
NEEDLESS = (*LOGS, "progress.json", "evaluation.json")  # for a training

Weights = dict[str, torch.Tensor]


def weights(checkpoint: Path) -> Weights:
    saved = open_saved(checkpoint)
    return {name: saved.whole(name) for name in saved.names()}


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, and runs/ as they are after all: `other` has finished; `run` was interrupted a step before
    its end, by the end of its second attempt as a job of this machine."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("KILOBATCH_CACHE", str(folder / "cache"))
        patch.setattr(launcher, "run_workers", worker_in_process.run_workers)
        for k, split in enumerate(("train", "test")):
            pixels = np.random.default_rng(k).integers(0, 256, (24, 8, 8, 3), np.uint8)
            np.savez(f"{split}.npz", images=pixels, labels=np.arange(24) % 2, class_names=["ant", "bee"])
        from kilobatch.launch.cli.train import evaluate, train

        assert train("demo", [*RECIPE[1:], "run.name=other"], 1) == 0
        assert evaluate("other", ["knn"], [], {"train": None, "test": None}, 1) == 0
        shutil.copytree("runs/other", RUN)
        shutil.rmtree(RUN / f"checkpoints/step-{LAST:08d}")
        next((RUN / "tensorboard").glob("events*")).rename(RUN / "tensorboard" / "events")
        (RUN / "logs" / "rank-0.log").write_text("".join(f"2026-11-22T07:50:0{k}.123Z step {k}\n" for k in range(8)))
        run_folder.set_status(RUN, "interrupted", 1)
        job = JobFile(cluster="local", job_id="local-1-2", submitted=job_history.utc_now(), code="code/001")
        job_history.write_job_file(RUN, job)
        number = job_history.record_start(RUN, "local-1-2", 0, ["n0"], 1)
        job_history.record_stop_request(RUN, number, "SIGUSR2", "preempted")
        job_history.record_end(RUN, number, "preempted", requeued=True)
        job_history.record_start(RUN, "local-1-2", 1, ["n0"], 1)
        (RUN / "cluster.yaml").write_text("workers_per_node: 1\n")
        shutil.copytree("runs", "whole")
    return folder


@pytest.fixture
def command(
    kilobatch: Callable[..., CommandResult], trained: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CommandResult]:
    monkeypatch.chdir(trained)
    monkeypatch.setenv("KILOBATCH_CACHE", str(trained / "cache"))
    monkeypatch.setattr(launcher, "run_workers", worker_in_process.run_workers)
    return kilobatch


def damages_of(file: str, random: np.random.Generator, each: int) -> Iterator[tuple[str, Damage]]:
    load = FILES[file]
    of_values = 5 * each if load else 0
    return damage.damages(Path("whole/run") / file, random, each=each, of_values=of_values, load=load or json.loads)


def check(result: CommandResult, arguments: tuple[str, ...], file: str, what: str) -> None:
    """One message that names the file where it is refused, no traceback anywhere."""
    said = f"{' '.join(arguments)} with {file}, {what}:\n{result.out}\n{result.err}"
    assert "Traceback" not in result.out + result.err, said
    assert result.code in (0, 2), said
    if result.code == 2:
        refusals = [line for line in result.err.splitlines() if line.startswith("kilobatch: ")]
        refusals = [line for line in refusals if "warning:" not in line and "goes on as a run of its own" not in line]
        assert len(refusals) == 1 and len(refusals[0]) < 1500, said
        # A wrong value of identity.json is a change of the recipe; without job.json there is no job.
        others = "has changed since it began", "was not submitted", "is not its own"
        assert any(text in result.err for text in (Path(file).parts[0], *others)), said


def check_reading(command: Callable[..., CommandResult], file: str, damage: tuple[str, Damage]) -> None:
    what, do = damage
    put_back(RUN, Path("whole/run"))
    do(RUN / file)
    for arguments in READING:
        result = command(*arguments)
        check(result, arguments, file, what)
        if arguments == ("status",):
            rows = [line.split()[0] for line in result.out.splitlines()]
            assert result.code == 0 and {"other", "run"} <= set(rows), (file, what, result.out)


def check_writing(
    command: Callable[..., CommandResult], file: str, damage: tuple[str, Damage], arguments: tuple[str, ...]
) -> None:
    what, do = damage
    shutil.rmtree("runs/tuned", ignore_errors=True)
    put_back(RUN, Path("whole/run"))
    do(RUN / file)
    result = command(*arguments)
    check(result, arguments, file, what)
    if arguments == WRITING[0] and result.code == 0:
        trained, right = (weights(Path(run) / f"checkpoints/step-{LAST:08d}") for run in (RUN, "whole/other"))
        assert same(trained, right), (file, what)
    if arguments[0] == "resume" and file in NEEDLESS and "folder" not in what:
        assert result.code == 0, (file, what, result.err)
    if file.startswith("checkpoints"):
        assert f"step-{BEFORE:08d}" in result.err, (file, what, arguments)
        assert result.code == (2 if arguments[0] == "train" else 0), (file, what, arguments)


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_hides_nothing_and_disturbs_no_training(file: str, command: Callable[..., CommandResult]):
    random = np.random.default_rng(SEED)
    found = list(damages_of(file, random, 1))
    for chosen in random.choice(len(found), min(4, len(found)), replace=False):
        check_reading(command, file, found[chosen])
    check_writing(command, file, found[int(random.integers(len(found)))], WRITING[0])


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_in_every_way(file: str, command: Callable[..., CommandResult]):
    random = np.random.default_rng(SEED)
    for found in damages_of(file, random, 2):
        check_reading(command, file, found)
        for arguments in (WRITING[0], WRITING[int(random.integers(1, len(WRITING)))]):
            check_writing(command, file, found, arguments)


def test_damaged_resources_of_a_job(trained: Path, tmp_path: Path):
    random, path = np.random.default_rng(SEED), tmp_path / "cluster.yaml"
    whole = trained / "whole/run/cluster.yaml"
    for what, do in damage.damages(whole, random, each=20, of_values=20, load=yaml.safe_load):
        shutil.copy(whole, path)
        do(path)
        try:
            cluster_again("local", path, {})
        except UserError as error:
            first, *others = str(error).split("\n  ")  # several mistakes stand on a line each
            assert all("cluster.yaml" in line and "\n" not in line for line in others or [first]), what
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.slow
def test_as_processes(trained: Path, monkeypatch: pytest.MonkeyPatch):
    """The newest checkpoint has a flipped bit, and the metrics a damaged line: it goes on from the one before."""
    monkeypatch.chdir(trained)
    put_back(RUN, Path("whole/run"))
    for file, place in ((RUN / NEWEST / "rank-00000-of-00001.safetensors", -1), (RUN / "metrics.jsonl", 0)):
        content = bytearray(file.read_bytes())
        content[place] ^= 1
        file.write_bytes(content)
    launched = real_runs.command("resume", str(RUN), "--workers", "1")
    launched.ends(0, within=240)
    said = launched.last_output()
    assert f"step-{BEFORE:08d}: the checksum" in said and "passed over" in said and "damaged lines in 1 place;" in said
    assert "Traceback" not in said
    assert same(*(weights(Path(run) / f"checkpoints/step-{LAST:08d}") for run in (RUN, "whole/other")))
    for file in ("state.json", "recipe.yaml"):
        put_back(RUN, Path("whole/run"))
        (RUN / file).write_bytes(b"[" * damage.DEEP)
        listing = real_runs.command("status")
        listing.ends(0, within=60)
        assert "other  finished" in listing.last_output() and f"{file} is damaged" in listing.last_output()
