"""The parity tables: every method agrees with its formula, and every wrong construction differs from it."""

import pytest

from kilobatch.data.errors import UserError
from kilobatch.trainer.parity import LAYOUTS, ParityRow, parity_tables

# By name: whether the method has a memory, and the number of wrong constructions in its table.
METHODS = {
    "moco": (True, 2),
    "moco_v3": (False, 2),
    "mochi": (True, 2),
    "instance_discrimination": (True, 2),
    "pirl": (True, 2),
    "simclr_v2": (True, 3),
    "simclr_clip": (False, 2),
    "barlow_twins": (False, 4),
    "vicreg": (False, 3),
    "finetune": (False, 1),
    "distill": (False, 2),
    "seed": (True, 2),
    "byol": (False, 2),
    "simsiam": (False, 2),
    "nnclr": (True, 4),
    "pcl": (True, 3),
    "hcsc": (True, 3),
    "swav": (False, 2),
    "swav_queue": (True, 1),
    "dino": (True, 5),
    "deepcluster_v2": (True, 2),
    "mice": (True, 2),
}
PARAMETERS_IN_LOSS = ("swav", "swav_queue", "dino", "mice")
TOY = "tests.helpers.protocol_toy"  # uses every place of the protocol


@pytest.fixture(scope="module")
def tables() -> dict[str, list[ParityRow]]:
    return parity_tables("simclr", TOY, *METHODS)


@pytest.fixture
def rows(tables: dict[str, list[ParityRow]]) -> list[ParityRow]:
    return tables["simclr"]


def test_every_layout_has_the_formulas_gradient(rows: list[ParityRow]) -> None:
    table = [row for row in rows if row.name == "simclr"]
    assert len(table) == 2 * len(LAYOUTS)
    bad = [row for row in table if not (row.right and row.agrees)]
    assert not bad


def test_every_wrong_construction_is_found(rows: list[ParityRow]) -> None:
    constructions = [row for row in rows if row.name != "simclr"]
    assert sum(row.right for row in constructions) == 3 and len(constructions) == 10
    assert all(row.ok for row in constructions)
    # Found by a margin, and as the theory says: a quarter of the gradient has its direction but not its size.
    assert all(row.error > 0.1 for row in constructions if not row.right)
    wrong = {row.name: row for row in constructions if not row.right}
    for name in ("whole loss on every rank, own slice", "Barlow Twins, cross-correlation by an in-place all-reduce"):
        assert wrong[name].cosine == pytest.approx(1) and wrong[name].norm_ratio == pytest.approx(0.25)
    assert wrong["VICReg, variance and covariance per rank"].cosine < 0.999


@pytest.mark.parametrize("name", METHODS)
def test_methods_have_the_formulas_gradients_and_memories(tables: dict[str, list[ParityRow]], name: str) -> None:
    rows, (has_memory, wrongs) = tables[name], METHODS[name]
    assert [row for row in rows if not row.ok] == []
    assert sum(row.name == name for row in rows) == 2 * len(LAYOUTS)
    memories = [row for row in rows if row.name == f"{name}, what it remembers"]
    assert len(memories) == (2 * len(LAYOUTS) if has_memory else 0)
    wrong = {row.name: row for row in rows if not row.right}
    assert len(wrong) == wrongs and all(row.error > 0.001 for row in wrong.values())  # the limit is 1e-12
    if name not in PARAMETERS_IN_LOSS:  # those get the whole gradient on every rank
        assert wrong["whole loss on every rank, own slice"].norm_ratio == pytest.approx(0.25)


def test_every_place_of_the_protocol_is_exact(tables: dict[str, list[ParityRow]]) -> None:
    rows = tables[TOY]
    assert [row for row in rows if not row.ok] == []
    assert [sum(row.name == name for row in rows) for name in (TOY, f"{TOY}, what it remembers")] == [
        2 * len(LAYOUTS)
    ] * 2
    right, wrong = (row for row in rows if row.name.startswith("partners"))
    assert right.right and wrong.name == "partners among a rank's whole batch"
    assert wrong.error > 0.04 and not wrong.right


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UserError, match="simclr"):
        parity_tables("simclrr")
