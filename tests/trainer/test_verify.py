import pytest

from data.refusal import Refusal
from trainer.verify import LAYOUTS, Row, verify


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return list(verify("simclr"))


def test_every_layout_has_the_formulas_gradient(rows: list[Row]) -> None:
    table = [row for row in rows if row.name == "simclr"]
    assert len(table) == 2 * len(LAYOUTS)
    bad = [row for row in table if not (row.right and row.agrees)]
    assert not bad


def test_every_wrong_construction_is_found_out(rows: list[Row]) -> None:
    constructions = [row for row in rows if row.name != "simclr"]
    assert sum(row.right for row in constructions) == 3 and len(constructions) == 10
    assert all(row.ok for row in constructions)
    # By a margin, and as the theory has it: a quarter of the gradient has its direction and not its size.
    assert all(row.error > 0.1 for row in constructions if not row.right)
    wrong = {row.name: row for row in constructions if not row.right}
    for name in ("whole loss on every rank, own slice", "Barlow Twins, cross-correlation by an in-place all-reduce"):
        assert wrong[name].cosine == pytest.approx(1) and wrong[name].norm_ratio == pytest.approx(0.25)
    assert wrong["VICReg, variance and covariance per rank"].cosine < 0.999


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(Refusal, match="simclr"):
        list(verify("simclrr"))
