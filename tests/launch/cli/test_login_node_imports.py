"""Commands that only read, check or list load no large package, and so answer at once on a login node."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.specs import open_source

HEAVY = ("torch", "torchvision", "numba", "sklearn", "scipy", "deepspeed", "ffcv", "tensorboard", "matplotlib")

COMMAND = """
from kilobatch.launch.__main__ import main
try:
    main(sys.argv[1:])
except SystemExit as exit_:
    code = exit_.code
"""

READ_EVERY_RECIPE = """
from kilobatch.data.errors import UserError
from kilobatch.launch.recipes import catalogue, recipe
from kilobatch.launch.recipes.checks import check

for name in catalogue.recipe_names():
    for data in ("digits", "some.npz", "npz:some.npz", "some.beton", "folder:photos", "cifar10:."):
        chosen, settings = recipe.read_recipe(name, [f"data.train={data}", "data.test=digits", "run.device=cuda"])
        try:
            check(chosen, 2, settings)
            print(name, data, "fits")
        except UserError as refusal:
            print(refusal)
recipe.schema()
code = 0
"""

IMPORT_OPTIONS = """
from importlib import import_module
from pathlib import Path

from kilobatch import data, methods, trainer

for package in (data, methods, trainer):
    folder = Path(package.__file__).parent
    for path in folder.rglob("*options.py"):
        name = ".".join(path.relative_to(folder.parent.parent).with_suffix("").parts)
        import_module(name)
        print(name)
code = 0
"""


def ran(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the code in a new process, and fails if that process has loaded one of the packages HEAVY in the end."""
    check = (
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\nsys.exit(f'loaded: {{heavy}}' if heavy else code)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\n{check}", *arguments],
        cwd=folder,
        env=os.environ | {"KILOBATCH_CACHE": str(folder / "cache"), "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    print(f"{time.perf_counter() - start:.2f} s: {' '.join(arguments) or 'code'}")
    assert "loaded [" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["--help"], 0, "train"),
        (["train", "--help"], 0, "--workers"),
        (["recipes"], 0, "simclr_imagenet"),
        (["recipes", "--schema"], 0, '"temperature"'),
        (["recipes", "demo"], 0, "demo.yaml line 10"),
        (["options"], 0, "method.temperature (number above 0"),
        (["init", "digits", "--gpu", "cpu", "--method", "simclrv2"], 2, "did you mean 'simclr_v2'?"),
        (["train", "dmeo"], 2, "did you mean 'demo'?"),
        (["train", "demo", "method.temprature=1"], 2, "did you mean 'temperature'?"),
        (["train", "demo", "data.views.count=3", "--workers", "2"], 2, "simclr takes 2 views"),
        (["train", "simclr_imagenet", "--workers", "2"], 2, "train.beton does not exist"),
        (["resume", "demo", "optimizer.lr=0.1"], 2, "there is no run 'demo'"),
        (["branch", "demo", "new"], 2, "there is no run 'demo'"),
        (["submit", "demo", "--dry-run", "--time", "1:00:00", "--workers-per-node", "2"], 0, "srun "),
        (["submit", "demo", "data.batch=477", "--time", "1:00:00", "--workers-per-node", "2"], 2, "use 476 or 478"),
        (["status"], 0, "no runs"),
        (["logs", "demo"], 2, "there is no run 'demo'"),
    ],
)
def test_commands_that_train_nothing(arguments: list[str], code: int, part: str, tmp_path: Path) -> None:
    done = ran(COMMAND, tmp_path, *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert part in done.stdout + done.stderr


def test_every_recipe_is_read_and_checked(tmp_path: Path) -> None:
    """Each recipe is checked against each kind of data, and for a device that this machine need not have."""
    images, labels = np.zeros((8, 8, 8, 3), np.uint8), np.arange(8)
    np.savez(tmp_path / "some.npz", images=images, labels=labels)
    convert(open_source(f"npz:{tmp_path}/some.npz", "train"), tmp_path / "some.beton")
    done = ran(READ_EVERY_RECIPE, tmp_path)
    assert done.returncode == 0, done.stderr
    for part in ("demo digits fits", "8 images of data.train 'npz:some.npz'", "8 images of data.train 'some.beton'"):
        assert part in done.stdout
    assert "there is no such folder" in done.stdout and "has no cifar-10-batches-py/" in done.stdout


def test_options_load_nothing_heavy(tmp_path: Path) -> None:
    done = ran(IMPORT_OPTIONS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {
        "kilobatch.data.loading.options",
        "kilobatch.methods.networks.options",
        "kilobatch.trainer.optim.options",
        "kilobatch.trainer.evaluate.options",
    } <= {*done.stdout.split()}
