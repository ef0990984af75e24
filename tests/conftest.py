"""How the tests are spread over processes (pytest -n 2 --dist loadgroup --no-loadscope-reorder, as make test does)."""

from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Long ones begin first, so that no process waits for another's at the end. What is not named begins after these.
LONG = [
    "slurm",
    "end_to_end/test_kill_drill.py",
    "launch/pipelines/test_pipeline.py",
    "end_to_end/test_pipeline_kills.py",
    "end_to_end/test_resume.py",
    "trainer/optim/test_zero.py",
    "launch/jobs/test_local_queue.py",
    "trainer/checkpoint/test_memory_resume.py",
    "trainer/test_parity.py",
]


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests stay together, as they share what is dear to make; those of SLURM as one, as they share its
    cluster."""
    group = {item: _group(item) for item in items}
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group[item]))
    items.sort(key=lambda item: LONG.index(group[item]) if group[item] in LONG else len(LONG))


def _group(item: pytest.Item) -> str:
    file = item.path.relative_to(HERE)
    return "slurm" if file.parts[0] == "slurm" else str(file)
