"""engine.precision auto: what all ranks have units for, decided once for a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from kilobatch.data.cpus import has_bf16_units
from kilobatch.launch.planning.machines import find_machine, on_machine
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.launch.runs import identity
from kilobatch.launch.runs.identity import Identity, ImagesIdentity
from kilobatch.launch.worker.devices import with_precision
from kilobatch.methods import collectives
from kilobatch.trainer import engine
from kilobatch.trainer.options import EngineOptions
from tests.helpers.process_groups import run_ranks

CPU = torch.device("cpu")


def decided(run: Path, without_units: set[int]) -> str:
    """The precision of a run of whose ranks some have no units for bf16."""
    engine.has_bf16_units = lambda device: collectives.rank() not in without_units
    return with_precision(run, resolve_recipe("simclr_cifar10", []), CPU).engine.precision


def began(run: Path) -> Path:
    """A folder of a run that has recorded what it is."""
    run.mkdir()
    images = ImagesIdentity(sha256="", samples=1, classes=None)
    record: dict[str, Any] = {"recorded": "", "step": 0, "train": images, "data_sha256": "", "test": None}
    identity.write_identity(run, Identity(**record, recipe={}, versions={}))
    return run


@pytest.mark.parametrize(("without_units", "precision"), [(set[int](), "bf16"), ({1}, "fp32"), ({0, 1}, "fp32")])
def test_ranks_agree_on_the_least(without_units: set[int], precision: str, tmp_path: Path) -> None:
    run = began(tmp_path / "run")
    assert run_ranks(2, decided, run, without_units) == [precision] * 2
    recorded = identity.read_identity(run)
    assert recorded and recorded.precision == precision


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether this machine has units for bf16: the last one counts."""
    has = [True]
    monkeypatch.setattr(engine, "has_bf16_units", lambda device: has[-1])
    return has


def precision_of(run: Path, changes: list[str]) -> str:
    return with_precision(run, resolve_recipe("simclr_cifar10", changes), CPU).engine.precision


def test_a_requeue_never_switches(units: list[bool], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick, slow = began(tmp_path / "quick"), began(tmp_path / "slow")
    assert precision_of(quick, []) == "bf16"
    units.append(False)
    assert precision_of(slow, []) == "fp32" and not capsys.readouterr().err
    assert precision_of(quick, []) == "bf16"
    assert "this run began in bf16, for which a worker's device has no units now" in capsys.readouterr().err
    units.append(True)
    assert precision_of(slow, []) == "fp32"


def test_a_recipe_that_says_its_precision_is_taken_at_its_word(units: list[bool], tmp_path: Path) -> None:
    run = began(tmp_path / "run")
    assert precision_of(run, ["engine.precision=fp32"]) == "fp32"
    recorded = identity.read_identity(run)
    assert recorded and recorded.precision is None


def test_auto_never_reaches_an_engine() -> None:
    assert resolve_recipe("simclr_cifar10", []).engine.precision == "auto"
    with pytest.raises(ValidationError):
        resolve_recipe("simclr_cifar10", []).engine.options()
    with pytest.raises(ValidationError):
        EngineOptions(precision="auto")  # pyright: ignore[reportArgumentType]


def test_a_plan_has_the_precision_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = resolve_recipe("simclr_cifar10", [])
    found = {name: on_machine(recipe, find_machine(name)).engine.precision for name in ("a100", "h100", "v100", "cpu")}
    assert found == {"a100": "bf16", "h100": "bf16", "v100": "fp32", "cpu": "fp32"}
    monkeypatch.setattr("kilobatch.launch.planning.machines.has_bf16_units", lambda: True)
    assert on_machine(recipe, find_machine("cpu")).engine.precision == "bf16"
    fp16 = resolve_recipe("simclr_cifar10", ["engine.precision=fp16"])
    assert on_machine(fp16, find_machine("a100")).engine.precision == "fp16"


@pytest.mark.parametrize(
    ("flags", "limit", "has"),
    [
        ("fpu avx512f avx512_bf16 vme", "", True),
        ("fpu avx512f amx_bf16 amx_tile", "", True),
        ("fpu avx512f avx512_vnni", "", False),
        ("fpu avx512f avx512_bf16", "AVX512_CORE_VNNI", False),
        ("fpu avx512f avx512_bf16", "avx512_core_bf16", True),
    ],
)
def test_units_of_a_cpu(flags: str, limit: str, has: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nmodel name\t: a CPU\nflags\t\t: {flags}\nbugs\t\t: none\n")
    assert has_bf16_units(info) == has
    assert not has_bf16_units(tmp_path / "absent")
