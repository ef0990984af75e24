"""Damage to the files of a pipeline and of a sweep's points: one message that names the file, and all runs in sight.

The seed is stated.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from kilobatch.launch.pipelines.pipeline import STAGES
from kilobatch.launch.pipelines.stages import PipelineRequest, create_runs, plan_pipeline
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import JobFile
from tests.helpers import damage
from tests.helpers.damage import put_back
from tests.launch.conftest import CommandResult

SEED = 13
WHOLE = Path("whole")


def assert_plain(result: CommandResult, file: str, what: str) -> None:
    assert result.code in (0, 2) and "Traceback" not in result.out + result.err, (file, what, result.err)
    if result.code == 2:
        lines = [line for line in result.err.splitlines() if line.startswith("kilobatch: ")]
        assert len(lines) == 1 and len(lines[0]) < 1000, (file, what, result.err)


@pytest.mark.parametrize("file", ["pipeline.yaml", "pipeline.json"])
def test_the_books_of_a_pipeline(file: str, kilobatch: Callable[..., CommandResult]):
    top = plan_pipeline(PipelineRequest("simclr_v2_digits", []), "mine").top
    create_runs(plan_pipeline(PipelineRequest("simclr_v2_digits", []), "mine"), 1)
    row = {"encoder": "convnet", "parameters": 160000, "labels": 72, "images": 1437, "values": {"knn/top1": 0.5}}
    (top / "pipeline.json").write_text(json.dumps([{"stage": stage, **row} for stage in STAGES]))
    for stage in STAGES:
        run_folder.set_status(top / stage, "finished", 1)
    shutil.copytree(top, WHOLE)
    random, load = np.random.default_rng(SEED), yaml.safe_load if file.endswith(".yaml") else json.loads
    named = 0
    for what, do in damage.damages(WHOLE / file, random, each=1, of_values=10, load=load):
        put_back(top, WHOLE)
        do(top / file)
        for arguments in (("status", "mine"), ("resume", "mine"), ("cancel", "mine")):
            result = kilobatch(*arguments)
            assert_plain(result, file, what)
            named += f"{file} is damaged" in result.err
            if arguments[0] == "status":
                assert all(f"mine/{stage} " in result.out for stage in STAGES), (what, result.out)
        assert kilobatch("status").code == 0, what
    assert named > 5


@pytest.mark.parametrize("file", ["recipe.yaml", "state.json", "job.json", "attempts.jsonl"])
def test_a_point_of_a_sweep(file: str, kilobatch: Callable[..., CommandResult]):
    recipe = resolve_recipe("demo", [])
    for name in ("0-a", "1-b", "2-c"):
        options = recipe.run.model_copy(update={"folder": "runs/sweep", "name": name})
        run = run_folder.create_run(options, "demo", recipe.dump_yaml(), 1)
        job = JobFile(cluster="local", job_id="local-1-1_1", submitted=job_history.utc_now(), code="../code/001")
        job_history.write_job_file(run, job)
        job_history.record_end(run, job_history.record_start(run, "local-1-1_1", 0, ["n0"], 1), "crashed", how="x")
        run_folder.set_status(run, "failed", 1)
    shutil.copytree("runs/sweep/1-b", WHOLE)
    load = {"recipe.yaml": yaml.safe_load, "attempts.jsonl": lambda text: None}.get(file, json.loads)
    for what, do in damage.damages(WHOLE / file, np.random.default_rng(SEED), each=1, of_values=4, load=load):
        put_back(Path("runs/sweep/1-b"), WHOLE)
        do(Path("runs/sweep/1-b") / file)
        for arguments in (("status",), ("status", "--best-first", "sweep"), ("status", "sweep"), ("cancel", "sweep")):
            result = kilobatch(*arguments)
            assert_plain(result, file, what)
            if arguments[0] == "status":
                rows = {line.split()[0] for line in result.out.splitlines()}
                assert result.code == 0 and {f"sweep/{point}" for point in ("0-a", "1-b", "2-c")} <= rows, what
