"""Learning-rate schedules against values written out by hand."""

from math import cos, pi

import pytest
from pydantic import ValidationError

from kilobatch.trainer.optim.schedules import ScheduleOptions, lr_at, total_steps


def test_simclr_at_100_epochs() -> None:
    """The values of google-research/simclr's learning_rate_schedule, 312 steps an epoch, written out."""
    options = ScheduleOptions(epochs=100, warmup_epochs=10)
    warmup, total = 3120, 31200
    assert total_steps(options, 312) == total
    assert lr_at(options, 4.8, 0, 312) == 0
    assert lr_at(options, 4.8, 1560, 312) == pytest.approx(2.4)
    assert lr_at(options, 4.8, warmup, 312) == pytest.approx(4.8)
    assert lr_at(options, 4.8, (warmup + total) // 2, 312) == pytest.approx(2.4)
    assert lr_at(options, 4.8, total - 1, 312) == pytest.approx(2.4 * (1 + cos(pi * (total - 1 - warmup) / 28080)))
    assert lr_at(options, 4.8, total, 312) == pytest.approx(0)


def test_rises_then_falls() -> None:
    options = ScheduleOptions(epochs=5, warmup_epochs=1.5)
    rates = [lr_at(options, 1.0, step, 10) for step in range(50)]
    assert rates[:16] == sorted(rates[:16]) and rates[15] == 1.0
    assert rates[15:] == sorted(rates[15:], reverse=True)


def test_cosine_ends_at_final() -> None:
    options = ScheduleOptions(epochs=2, warmup_epochs=0, final=0.1)
    assert lr_at(options, 3.0, 0, 10) == 3.0
    assert lr_at(options, 3.0, 20, 10) == pytest.approx(0.3)


def test_constant_after_warmup() -> None:
    options = ScheduleOptions(epochs=3, warmup_epochs=1, name="constant")
    assert [lr_at(options, 2.0, step, 2) for step in range(6)] == [0, 1, 2, 2, 2, 2]


def test_steps_fall_at_the_milestones() -> None:
    """MoCo v1's, 5 steps an epoch: a tenth from epoch 120 on, a hundredth from 160 on."""
    options = ScheduleOptions(epochs=200, warmup_epochs=0, name="steps", milestones=(120, 160))
    rates = [lr_at(options, 0.03, step, 5) for step in (0, 599, 600, 799, 800, 999)]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003])


def test_nothing_but_warmup() -> None:
    options = ScheduleOptions(epochs=1, warmup_epochs=1)
    assert [lr_at(options, 1.0, step, 2) for step in range(3)] == [0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 5, "warmup_epochs": 6}, r"warmup_epochs \(6\) is more than epochs \(5\)"),
        ({"epochs": 0}, "greater than or equal to 1"),
        ({"final": 2.0}, "less than or equal to 1"),
        ({"warm_up": 1}, "Extra inputs"),
        ({"name": "steps"}, "go together"),
        ({"milestones": (5,)}, "go together"),
        ({"name": "steps", "epochs": 20, "milestones": (5, 20)}, r"milestones \[5, 20\] should lie"),
    ],
)
def test_refuses(options: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ScheduleOptions(**options)
