"""What these tests share: the cluster, whose absence fails them in CI, and a run that nothing befell."""

import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, missing
from tests.slurm.jobs import EPOCHS, left_alone


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if lacking := missing():
        why = f"no real SLURM on this machine: {', '.join(lacking)} missing (apt-get install slurm-wlm munge)"
        if os.environ.get("CI") == "true":
            pytest.fail(why)
        warnings.warn(f"NOTHING WAS TESTED ON SLURM: {why}", stacklevel=1)
        pytest.skip(why)
    # Not pytest's folder: a socket's path holds at most 107 bytes.
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
    return left_alone(tmp_path_factory.mktemp("whole"), EPOCHS)
