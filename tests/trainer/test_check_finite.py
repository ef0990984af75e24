"""A loss or gradient that is not finite stops all ranks before the update, and flags are agreed on."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from kilobatch.trainer.engine import Engine
from kilobatch.trainer.step import NonFinite, check_finite, forward_backward
from tests.helpers.process_groups import run_ranks
from tests.helpers.toy_method import own_batch, sgd_engine, toy, weights


def stopped(engine: Engine, outcome: Any) -> dict[str, Any]:
    before = weights(engine.method)
    with pytest.raises(NonFinite) as raised:
        check_finite(engine, outcome, step=7, flags=[True])
    untouched = all(torch.equal(x, before[name]) for name, x in weights(engine.method).items())
    error = raised.value
    return {"text": str(error), "loss": error.loss_ranks, "gradient": error.gradient_ranks, "untouched": untouched}


def bad_loss() -> dict[str, Any]:
    engine, mine = sgd_engine(toy()), own_batch()
    if dist.get_rank() == 1:
        mine.views[0][0] = float("nan")
    return stopped(engine, forward_backward(engine, mine))


def bad_gradient() -> dict[str, Any]:
    engine = sgd_engine(toy())
    outcome = forward_backward(engine, own_batch())
    if dist.get_rank() == 1:
        _poison(engine)
    return stopped(engine, outcome)


def overflow() -> dict[str, Any]:
    """fp16: an overflow on one rank skips the step on all, and once the loss scale is 1 it stops them."""
    engine = sgd_engine(toy(), precision="fp16")
    before = weights(engine.method)
    outcome = forward_backward(engine, own_batch())
    if dist.get_rank() == 1:
        _poison(engine)
    flags = check_finite(engine, outcome, 0, [dist.get_rank() == 1, False])
    engine.step(0.1)
    skipped = all(torch.equal(x, before[name]) for name, x in weights(engine.method).items())
    scalars = engine.scalars()
    while engine.loss_scale > 1:
        forward_backward(engine, own_batch())
        _poison(engine)
        engine.step(0.1)
    outcome = forward_backward(engine, own_batch())
    _poison(engine)
    return {"flags": flags, "skipped": skipped, "scalars": scalars, **stopped(engine, outcome)}


def _poison(engine: Engine) -> None:
    grad = next(engine.method.encoder.parameters()).grad
    assert grad is not None
    grad[0] = float("inf")


def agreed() -> list[bool]:
    engine = sgd_engine(toy())
    outcome = forward_backward(engine, own_batch())
    return check_finite(engine, outcome, 0, [dist.get_rank() == 1, False, dist.get_rank() == 0])


def scenarios() -> dict[str, Any]:
    return {scenario.__name__: scenario() for scenario in (bad_loss, bad_gradient, overflow, agreed)}


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(2, scenarios, timeout=300.0)


def test_a_loss_that_is_not_finite_stops_all_ranks(two: list[dict[str, Any]]) -> None:
    """The toy's loss compares all ranks' rows, so one rank's NaN is in every rank's loss."""
    for rank in two:
        assert rank["bad_loss"]["untouched"]
        assert rank["bad_loss"]["loss"] == [0, 1]
        assert "step 7: not finite: the loss on ranks 0, 1" in rank["bad_loss"]["text"]


def test_a_gradient_that_is_not_finite_names_its_rank(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["bad_gradient"]["untouched"]
        assert (rank["bad_gradient"]["loss"], rank["bad_gradient"]["gradient"]) == ([], [1])
        assert "step 7: not finite: the gradient on rank 1. Nothing was updated" in rank["bad_gradient"]["text"]


def test_fp16_overflow_lowers_the_scale_then_stops(two: list[dict[str, Any]]) -> None:
    for rank in two:
        found = rank["overflow"]
        assert found["flags"] == [True, False]
        assert found["skipped"]
        assert found["scalars"] == {"loss_scale": 2.0**15, "skipped_steps": 1}
        assert found["untouched"] and found["gradient"] == [0, 1]


def test_flags_are_agreed_on(two: list[dict[str, Any]]) -> None:
    assert [rank["agreed"] for rank in two] == [[True, False, True]] * 2
