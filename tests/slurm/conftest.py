"""Fixtures: a SLURM cluster (in CI the tests fail without one), and a run that is not interrupted."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing_binaries
from tests.slurm.jobs import EPOCHS, train_uninterrupted


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if lacking := missing_binaries():
        why = f"no real SLURM on this machine: {', '.join(lacking)} missing (apt-get install slurm-wlm munge)"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        warnings.warn(f"NOTHING WAS TESTED ON SLURM: {why}", stacklevel=1)
        pytest.skip(why)
    # pytest's own folder would be too long for munge's socket, whose path may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="kb-", ignore_cleanup_errors=True) as folder:
        made = Cluster(Path(folder))
        with pytest.MonkeyPatch.context() as patch:
            try:
                made.start()
                for name, value in made.environment.items():
                    patch.setenv(name, value)
                yield made
            finally:
                made.stop()


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_uninterrupted(tmp_path_factory.mktemp("whole"), EPOCHS)
