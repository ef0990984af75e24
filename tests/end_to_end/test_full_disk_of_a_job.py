"""A disk without room for a new file ends a job's attempt as refused: it says so, and is not queued anew."""

import json
import os
import subprocess
import sys
from pathlib import Path

from kilobatch.launch.jobs import attempt
from tests.helpers.private_mounts import private_mounts

# The files that an attempt appends to or writes in place have room left in their blocks; the meeting of the two nodes
# is a new file.
PROGRAM = """
import sys
from contextlib import suppress
from pathlib import Path

from kilobatch.launch.jobs.attempt import run_attempt
from kilobatch.launch.jobs.signals import Signals
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers.local import Local
from kilobatch.launch.schedulers.scheduler import Task

recipe = resolve_recipe("demo", ["run.name=full", f"run.folder={sys.argv[1]}"])
run = run_folder.create_run(recipe.run, "demo", recipe.dump_yaml(), 2)
job = JobFile(cluster="local", job_id="5", nodes=2, submitted=job_history.utc_now(), code="code/001")
job_history.write_job_file(run, job)
job_history.record_end(run, job_history.record_start(run, "4", 0, ["n0"], 2), "preempted", requeued=True)
run_folder.set_status(run, "queued", 2)
with run_folder.locked(run), suppress(OSError), (run / "filler").open("wb", buffering=0) as file:
    while True:
        file.write(bytes(1 << 12))
outcome = run_attempt(run, Task("5", 0, 0, 2, ["n0", "n1"]), Local(), Signals())
print(outcome, flush=True)
"""


def test_the_attempt_is_refused_and_not_queued_anew(tmp_path: Path) -> None:
    unshare = private_mounts()
    place = tmp_path / "disk"
    place.mkdir()
    script = f'mount -t tmpfs -o size=1m tmpfs {place} && "$@"; cat {place}/full/attempts.jsonl {place}/full/state.json'
    command = [*unshare, "sh", "-c", script, "sh", sys.executable, "-c", PROGRAM, str(place)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    said, *lines = done.stdout.splitlines()
    assert said == str(attempt.AttemptOutcome(requeued=False, code=1)), done.stdout + done.stderr
    end = json.loads(next(line for line in reversed(lines) if line.startswith('{"attempt": 2, "event": "ended"')))
    assert (end["reason"], end["requeued"], end["stopped"]) == ("refused", False, "refused")
    assert "no room left (No space left on device)" in end["lines"][0] and "could not be written" in end["lines"][0]
    assert '"status":"failed"' in done.stdout.replace(" ", "")
    assert "Traceback" not in done.stderr and done.stderr.count("no room left") == 1
