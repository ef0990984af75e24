"""Commands on a login node with many jobs answer soon, and load no torch."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from kilobatch.launch.jobs import submit
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import HERE, RECIPE, kilobatch

WITHOUT_TORCH = """
import sys
from kilobatch.launch.__main__ import main
try:
    main(sys.argv[1:])
finally:
    heavy = {"torch", "deepspeed", "ffcv", "numba"} & sys.modules.keys()
    assert not heavy, heavy
"""


@pytest.fixture(scope="module")
def queued(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs of twenty jobs and of three arrays of four jobs; all of them are held."""
    folder = tmp_path_factory.mktemp("queued")
    asked = {"time": "01:00:00", "extra": ["hold"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for k in range(20):
            submit.submit("demo", RECIPE[1:], [], f"run-{k}", None, asked, dry_run=False)
        for k in range(3):
            submit.submit("demo", RECIPE[1:], ["seed=0,1,2,3"], f"array-{k}", None, asked, dry_run=False)
    return folder


def processor_seconds(*arguments: str, folder: Path) -> float:
    """The processor time of a command: what it takes on an idle machine, where it waits for little else."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    kilobatch(*arguments, folder=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_many_jobs_are_listed_about_as_soon_as_none(queued: Path, tmp_path: Path) -> None:
    said = kilobatch("status", folder=queued)
    lines = [line for line in said.splitlines() if "queued (JobHeldUser)" in line]
    assert len(lines) == 20 + 3 * 4, said
    many, none = zip(
        *[(processor_seconds("status", folder=queued), processor_seconds("status", folder=tmp_path)) for _ in range(5)],
        strict=True,
    )
    # Both pay for the start of Python; 32 runs and the question to the scheduler may add half of that, not more.
    # It is a ratio because processor times themselves more than double on a machine that does other work.
    assert min(many) < 1.5 * min(none), f"{min(many):.2f} s, and {min(none):.2f} s without jobs"
    assert len(json.loads(kilobatch("status", "array-1", "--best-first", "--json", folder=queued))) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("status", "array-1", "--best-first", "--json"),
        ("logs", "run-3"),
        ("submit", *RECIPE, "--time", "01:00:00", "--dry-run"),
        ("cancel", "run-19"),
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_torch_on_the_login_node(queued: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, cwd=queued, env=os.environ | HERE, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    if arguments[0] == "logs":
        assert "run-3 has written nothing yet: queued as job" in done.stdout
        assert "(JobHeldUser)" in done.stdout
