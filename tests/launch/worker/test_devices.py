"""A machine's devices for the workers, and that a machine without a GPU's driver is known without torch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes.recipe import read_recipe
from kilobatch.launch.worker import devices
from kilobatch.trainer.ranks import gpu_driver

WITHOUT_TORCH = """
import sys
from kilobatch.launch.recipes.recipe import read_recipe
from kilobatch.launch.worker.devices import check_device, default_workers

recipe, _ = read_recipe("demo", ["run.device=" + sys.argv[1]])
print(default_workers(recipe))
check_device(recipe, 3)
assert "torch" not in sys.modules
"""


@pytest.fixture
def dev(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands for /dev; torch sees two GPUs wherever it is asked."""
    monkeypatch.setattr(gpu_driver, "DEV", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    return tmp_path


@pytest.mark.parametrize("file", ["nvidiactl", "nvidia0", "nvhost-gpu", "kfd", "dxg"])
def test_a_worker_for_each_gpu(dev: Path, file: str):
    (dev / file).touch()
    recipe, _ = read_recipe("demo", [])
    assert devices.default_workers(recipe) == 2
    devices.check_device(recipe, 2)
    with pytest.raises(UserError, match="worker 3 of this machine has no GPU: there are 2; use --workers 2"):
        devices.check_device(recipe, 3)
    assert devices.pick_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="worker 3 of this machine has no GPU"):
        devices.pick_device("cuda", 2)
    on_cpu, _ = read_recipe("demo", ["run.device=cpu"])
    assert devices.default_workers(on_cpu) == 1
    devices.check_device(on_cpu, 3)


def test_torch_is_not_asked_without_a_driver(dev: Path):
    recipe, _ = read_recipe("demo", [])
    assert devices.default_workers(recipe) == 1
    assert devices.pick_device("auto", 0).type == "cpu"
    with pytest.raises(UserError, match="torch sees no CUDA device here; use run.device=cpu or auto"):
        devices.pick_device("cuda", 0)


@pytest.mark.parametrize("device", ["cpu", *([] if torch.cuda.is_available() else ["auto"])])
def test_a_launcher_on_a_cpu_loads_no_torch(device: str):
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, device], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_the_modules_of_a_worker_leave_triton_to_those_with_a_gpu():
    """It is a tenth of their time, and of the time to a run's first step on a CPU."""
    heavy = "import sys\nimport kilobatch.launch.worker.main\nprint('torch' in sys.modules, 'triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
