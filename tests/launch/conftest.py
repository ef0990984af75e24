"""The fixture `kilobatch`, which calls the command line in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kilobatch.launch.__main__ import main
from kilobatch.launch.processes import launcher


@dataclass
class CommandResult:
    """The exit code of a command, and what it wrote to stdout and stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def kilobatch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., CommandResult]:
    """Runs a command in an empty folder, with an empty cache. The test fails if the command starts workers."""

    def fail(*arguments: object) -> bool:
        raise AssertionError("workers were about to start")

    monkeypatch.setattr(launcher, "run_workers", fail)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KILOBATCH_CACHE", str(tmp_path / "cache"))

    def run(*argv: str) -> CommandResult:
        with pytest.raises(SystemExit) as exit_:
            main(list(argv))
        captured = capsys.readouterr()
        return CommandResult(int(exit_.value.code or 0), captured.out, captured.err)

    return run
