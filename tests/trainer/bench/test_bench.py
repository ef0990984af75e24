"""`kilobatch bench`: the best run counts, and a rate is in the unit of its limit."""

import time

import pytest
import torch

from kilobatch.data.views.options import Views
from kilobatch.trainer.bench import collectives, loader, rates

CPU = torch.device("cpu")
# Both are measured for a fraction of a second, one after the other, so that on a busy machine a rate may be above its
# limit. A rate in another unit, or of another count of views, is further off.
APART = 5.0


def test_the_best_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, durations = [0.0], iter([0.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work() -> None:
        clock[0] += next(durations)

    assert rates.best(work, CPU, seconds=0, least=3) == 1.0


def test_the_loader_is_compared_with_decoding_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SECONDS", 0.2)
    (row,) = loader.rows(CPU)
    assert 0 < row.rate < APART * row.limit


def test_the_loader_makes_a_recipes_own_groups_of_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SECONDS", 0.2)
    (row,) = loader.rows(CPU, [Views(count=1, size=32), Views(count=5, size=16)])
    assert row.what == "loader, all operations, 1 x 32 + 5 x 16 pixels" and "6 views of each" in row.limited_by
    assert 0 < row.rate < APART * row.limit


def test_collectives_give_a_plan_its_link() -> None:
    rows, link = collectives.rows(CPU, 2)
    assert [row.what.split()[0] for row in rows] == ["all-gather", "all-reduce"]
    assert all(0 < row.rate < APART * row.limit for row in rows)
    assert link["link"] == rows[1].rate and 0 < link["latency"] < 1
