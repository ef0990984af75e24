"""A wheel, installed into an environment of its own beside torch, FFCV and DeepSpeed, trains outside the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.helpers.real_runs import TINY

CHECKOUT = Path(__file__).parents[2]
SOURCES = ["src", "launch", "trainer", "methods", "data", "configs"]


def run(*command: str | Path, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_trains_outside_the_checkout(tmp_path: Path) -> None:
    checkout, outside = tmp_path / "checkout", tmp_path / "outside"
    outside.mkdir()
    for folder in SOURCES:  # copied, as a build leaves files beside the sources
        shutil.copytree(CHECKOUT / folder, checkout / folder, symlinks=True, ignore=shutil.ignore_patterns("*.pyc"))
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(CHECKOUT / file, checkout)
    build = ["-m", "pip", "wheel", "-q", ".", "--no-deps", "--no-build-isolation", "-w", outside]
    run(sys.executable, *build, folder=checkout)

    (wheel,) = outside.glob("*.whl")
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"kilobatch"}

    run(sys.executable, "-m", "venv", outside / "venv", folder=outside)
    python = outside / "venv" / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=outside).strip()
    # What kilobatch needs comes from this environment; a .pth file is not read there, so its kilobatch does not.
    Path(site, "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, folder=outside)
    assert run(python, "-c", "import kilobatch; print(kilobatch.__file__)", folder=outside).startswith(site)

    train = [outside / "venv" / "bin" / "kilobatch", "train", *TINY, "data.batch=478", "schedule.epochs=3"]
    run(*train, "run.name=wheel", "--workers", "2", folder=outside)
    assert '"finished"' in (outside / "runs" / "wheel" / "state.json").read_text()
