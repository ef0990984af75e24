"""Damage at random places of a checkpoint that two ranks wrote: it is passed over by name, or holds what it held.

The seed is stated. Without the checksums of whole files, as where a training counts what to keep, it is found damaged
or taken as it is, and nothing else happens.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from kilobatch.trainer.checkpoint.description import DESCRIPTION, sealed
from kilobatch.trainer.checkpoint.reader import Damaged, Saved, newest, open_saved
from tests.helpers import damage
from tests.helpers.damage import put_back
from tests.helpers.sample_checkpoints import pieces, save, values

SEED = 13
FILES = ("rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors", DESCRIPTION)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 3 and 4."""
    folder = tmp_path_factory.mktemp("whole")
    for step in (3, 4):
        save(folder, 2, step, meta={"step": step})
    return folder


def content(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_right(saved: Saved) -> None:
    for name, tensor in values().items():
        assert saved.shape(name) == tensor.shape and content(saved.whole(name)) == content(tensor), name
    for rank in range(2):
        assert content(saved.own("method.queue", rank)) == content(pieces(rank, 2)["method.queue"].tensor)


@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_passed_over_by_name(file: str, whole: Path, tmp_path: Path):
    folder, random = tmp_path / "checkpoints", np.random.default_rng(SEED)
    damaged, of_values = folder / "step-00000004", 40 if file == DESCRIPTION else 0
    for what, do in damage.damages(whole / "step-00000004" / file, random, each=8, of_values=of_values):
        put_back(folder, whole)
        do(damaged / file)
        said: list[str] = []
        found = newest(folder, said.append)
        assert found == (right := folder / "step-00000003"), what
        assert len(said) == 1 and said[0].startswith(f"checkpoint {damaged}: ") and "\n" not in said[0], what
        assert file in said[0] and said[0].endswith("; passed over") and len(said[0]) < 1000, (what, said)
        try:
            open_saved(damaged, verify=False)
        except Damaged as error:
            assert "\n" not in str(error), what
        assert open_saved(right, verify=False).step == 3
    assert_right(open_saved(folder / "step-00000003"))


@pytest.mark.parametrize("content", [{}, {"files": {}}, {"step": 4, "world": 2, "files": {}}, {"meta": {}}])
def test_a_description_of_another_kind_with_its_checksum(content: dict[str, object], whole: Path, tmp_path: Path):
    put_back(tmp_path / "checkpoints", whole)
    (tmp_path / "checkpoints" / "step-00000004" / DESCRIPTION).write_bytes(sealed(content))
    said: list[str] = []
    assert newest(tmp_path / "checkpoints", said.append) == tmp_path / "checkpoints" / "step-00000003"
    assert "checkpoint.json cannot be used: it has no '" in said[0]
