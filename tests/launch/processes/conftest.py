"""The folder of a run whose workers run the programs of tests/programs."""

from pathlib import Path

import pytest

from tests.helpers.programs import PROGRAMS


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "logs").mkdir()
    return tmp_path
