"""Learning-rate schedules against values written out by hand."""

from math import cos, pi

import pytest
from pydantic import ValidationError

from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.optim.schedules import ScheduleOptions, decay_at, lr_at, rates_at, total_steps


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


def test_a_warmup_may_begin_above_0() -> None:
    """SwAV's: from 0.3 to 4.8 in two epochs of 5 steps."""
    options = ScheduleOptions(epochs=4, warmup_epochs=2, warmup_from=0.0625, name="constant")
    assert [lr_at(options, 4.8, step, 5) for step in (0, 1, 9, 10)] == pytest.approx([0.3, 0.75, 4.35, 4.8])


@pytest.mark.parametrize("name", ["cosine", "constant"])
def test_the_new_options_change_nothing_unless_they_are_given(name: str) -> None:
    """To the bit: the formulas of before."""
    options = ScheduleOptions(epochs=7, warmup_epochs=2.5, name=name, final=0.1)  # pyright: ignore[reportArgumentType]
    for step in range(49):
        fall = 0.1 + 0.9 * (1 + cos(pi * min(1.0, (step - 18) / 31))) / 2 if name == "cosine" else 1.0
        assert lr_at(options, 0.3, step, 7) == (0.3 * step / 18 if step < 18 else 0.3 * fall)


def test_by_epoch_the_rate_changes_at_borders_only() -> None:
    """MoCo's cosine: lr * 0.5 * (1 + cos(pi * epoch / epochs))."""
    options = ScheduleOptions(epochs=5, warmup_epochs=0, by_epoch=True)
    rates = [lr_at(options, 0.03, step, 4) for step in range(20)]
    assert rates == pytest.approx([0.03 * 0.5 * (1 + cos(pi * (step // 4) / 5)) for step in range(20)], rel=1e-12)
    assert len(set(rates)) == 5
    warm = ScheduleOptions(epochs=4, warmup_epochs=2, warmup_from=0.1, by_epoch=True, name="constant")
    assert [lr_at(warm, 1.0, step, 2) for step in range(6)] == pytest.approx([0.1, 0.1, 0.55, 0.55, 1, 1])


def test_the_decay_goes_from_one_to_the_other_by_a_cosine() -> None:
    """facebookresearch/dino, utils.cosine_scheduler: final + 0.5 (base - final) (1 + cos(pi i / n))."""
    options = OptimizerOptions(weight_decay=0.04, final_weight_decay=0.4)
    found = [decay_at(options, step, 30) for step in range(30)]
    assert found == pytest.approx([0.4 + 0.5 * (0.04 - 0.4) * (1 + cos(pi * i / 30)) for i in range(30)], rel=1e-12)
    assert decay_at(OptimizerOptions(weight_decay=0.3), 17, 30) is None  # that of the optimizer's groups


def test_the_rates_of_a_recipes_step() -> None:
    optimizer = OptimizerOptions(lr=0.2, scaling="linear", weight_decay=0.0, final_weight_decay=1.0)
    rates = rates_at(ScheduleOptions(epochs=2, warmup_epochs=0), optimizer, 512, 5, 5)
    assert rates == pytest.approx((0.4 * 0.5, 0.5))


def test_nothing_but_warmup() -> None:
    options = ScheduleOptions(epochs=1, warmup_epochs=1)
    assert [lr_at(options, 1.0, step, 2) for step in range(3)] == [0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": 5, "warmup_epochs": 6}, r"warmup_epochs \(6\) is more than epochs \(5\)"),
        ({"epochs": 0}, "greater than or equal to 1"),
        (
            {"by_epoch": True},
            "by_epoch true with warmup_epochs 10 and warmup_from 0: the first epoch's rate would be 0",
        ),
        ({"warmup_from": 1.5}, "less than or equal to 1"),
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
