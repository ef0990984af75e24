"""A disk that fills up between two checkpoints ends a run with one plain message, and its state says so."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.helpers.private_mounts import private_mounts
from tests.helpers.real_runs import TINY

OPTIONS = ["data.batch=130", "schedule.epochs=300", "checkpoint.every_steps=6", "evaluate.final=[]", "run.name=full"]


def test_the_run_is_refused_with_its_state_written(tmp_path: Path) -> None:
    unshare = private_mounts()
    place = tmp_path / "disk"
    place.mkdir()
    train = [sys.executable, "-m", "kilobatch", "train", *TINY, *OPTIONS, f"run.folder={place}", "--workers", "1"]
    script = f'mount -t tmpfs -o size=6m tmpfs {place} && "$@" 2>&1; code=$?; cat {place}/full/state.json; exit $code'
    started = subprocess.Popen(
        [*unshare, "sh", "-c", script, "sh", *train],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    inside = Path(f"/proc/{started.pid}/root{place}")
    deadline = time.monotonic() + 120
    while not list(inside.glob("full/checkpoints/step-*")):
        assert started.poll() is None and time.monotonic() < deadline, started.communicate()[0]
        time.sleep(0.05)
    with suppress(OSError), (inside / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    said, state = started.communicate(timeout=120)[0].split("{", 1)
    assert started.returncode == 2, said
    assert said.count("no room left") == 1 and "Traceback" not in said, said
    assert json.loads("{" + state)["status"] == "failed"
