"""A .beton file and its batches, which the tests of loaders share."""

from pathlib import Path

import pytest

from tests.helpers.loaders import SAMPLES, Epochs, loader, photo, write


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images with sides from 40 to 99: those below 65 are stored as pixels, the others as JPEGs."""
    images = [photo(i, 40 + 7 * i % 60, 40 + 11 * i % 60) for i in range(SAMPLES)]
    return write(tmp_path_factory.mktemp("loader") / "mixed.beton", images)


@pytest.fixture(scope="module")
def reference(beton: Path) -> Epochs:
    with loader(beton) as whole:
        return Epochs([list(whole.epoch(0)), list(whole.epoch(1))])
