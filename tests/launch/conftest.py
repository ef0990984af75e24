"""The command line, called in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kilobatch.launch.__main__ import main
from kilobatch.launch.processes import launcher as here


@dataclass
class Said:
    code: int
    out: str
    err: str


@pytest.fixture
def kilobatch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Said]:
    """Runs a command in an empty folder, with an empty cache. It may not get as far as starting workers."""

    def started(*arguments: object) -> bool:
        raise AssertionError("workers were about to start")

    monkeypatch.setattr(here, "run", started)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KILOBATCH_CACHE", str(tmp_path / "cache"))

    def run(*argv: str) -> Said:
        with pytest.raises(SystemExit) as left:
            main(list(argv))
        captured = capsys.readouterr()
        return Said(int(left.value.code or 0), captured.out, captured.err)

    return run
