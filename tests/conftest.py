"""Orders the tests for several processes (pytest -n 3 --dist loadfile --no-loadscope-reorder, as make test does: the
tests of a file stay together, as they share what is dear to make), and leaves those out that start processes themselves
(--quick, as make quick does)."""

import os
import sys
from collections.abc import Generator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from kilobatch.trainer.ranks.garbage import collect_from_now_on, collect_later

HERE = Path(__file__).parent
# Long ones begin first, so that no process waits for another's at the end. What is not named begins after these.
LONG = [
    "slurm",
    "end_to_end/test_kill_drill.py",
    "launch/pipelines/test_pipeline.py",
    "end_to_end/test_pipeline_kills.py",
    "end_to_end/test_resume.py",
    "launch/cli/test_resume_table.py",
    "trainer/optim/test_zero.py",
    "launch/jobs/test_local_queue.py",
    "trainer/checkpoint/test_memory_resume.py",
    "trainer/test_parity.py",
    "trainer/test_protocol.py",
    "end_to_end/test_endings.py",
    "end_to_end/test_memory.py",
    "launch/planning/test_question.py",
    "launch/cli/test_prepared_data.py",
    "launch/processes/test_hangs.py",
    "launch/planning/test_plan.py",
]
# Python's audit events for a process that is started. multiprocessing has none: see ProcessGuard.
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system"}

ONLY_PROCESSES = ["slurm", "end_to_end"]  # folders in which each test starts some
STOPPED = "starts another process"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="skip each test as soon as it starts another process")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")  # without bf16: one precision on every machine
    collect_later()
    if config.getoption("--quick"):
        config.pluginmanager.register(ProcessGuard())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(_group(item)) if _group(item) in LONG else len(LONG))


def pytest_collection_finish() -> None:
    collect_from_now_on()


def _group(item: pytest.Item) -> str:
    file = item.path.relative_to(HERE)
    return "slurm" if file.parts[0] == "slurm" else str(file)


class ProcessGuard:
    """Stops a test at the moment at which it starts another process, and reports it as skipped.

    So no list of such tests has to be kept: a test that begins to start processes leaves the quick run by itself.
    """

    def __init__(self) -> None:
        self.in_test = False
        self.started = ""  # what the running test wanted to start
        sys.addaudithook(self._audit)
        refuse, start = self._refuse, BaseProcess.start

        def guarded(self: BaseProcess) -> None:
            refuse("multiprocessing.Process.start")
            start(self)

        BaseProcess.start = guarded

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTS:
            self._refuse(f"{event} {arguments[0] if arguments else ''}".strip())

    def _refuse(self, what: str) -> None:
        if self.in_test:
            self.started = self.started or what
            # Derived from BaseException: the code under test may catch an OSError of a process that does not start.
            raise pytest.skip.Exception(f"{STOPPED}: {what}")

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        return True if collection_path in (HERE / name for name in ONLY_PROCESSES) else None

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        self.in_test, self.started = True, ""
        try:
            return (yield)
        finally:
            self.in_test = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """A test that was stopped has neither passed nor failed, whatever it made of that."""
        report = yield
        if self.started and (report.failed or (report.passed and report.when != "teardown")):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, f"Skipped: {STOPPED}: {self.started}")
        return report

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        stopped = [report for report in terminalreporter.getreports("skipped") if STOPPED in str(report.longrepr)]
        terminalreporter.write_line(
            f"--quick: {len(stopped)} tests were skipped as they start other processes, and the folders "
            f"{', '.join(ONLY_PROCESSES)} were left out; make test runs all of them"
        )
