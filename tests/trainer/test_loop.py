"""The loop ends where its steps are done or past, and its checkpoints record what a diverged training goes back to."""

from pathlib import Path
from typing import Any

import pytest

from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.divergence import describe_way_back
from kilobatch.trainer.loop import Loop
from kilobatch.trainer.step import NonFinite
from tests.helpers.process_groups import run_ranks
from tests.helpers.toy_loop import Steps, toy_loop
from tests.helpers.toy_method import sgd_engine, toy


def loop(checkpoints: Checkpoints, steps: Steps, epochs: int, stop_after: int | None = None) -> Loop:
    def stop() -> bool:
        return stop_after is not None and len(steps.taken) > stop_after

    return toy_loop(sgd_engine(toy()), checkpoints, steps, epochs, stop)


def run(folder: Path, epochs: int, *, resume: bool = False, stop_after: int | None = None) -> dict[str, Any]:
    """A training, or the rest of one: whether it finished, the steps that it took, and the checkpoints then."""
    steps = Steps()
    with Checkpoints(folder, CheckpointOptions(every_steps=1, keep_last=9), 0, 1) as checkpoints:
        made = loop(checkpoints, steps, epochs, stop_after)
        first = made.restore(open_saved(max(list_checkpoints(folder).values()))) if resume else 0
        finished = made.run(first)
    return {"finished": finished, "steps": steps.taken, "done": made.done, "saved": list(list_checkpoints(folder))}


def diverges(folder: Path) -> dict[str, Any]:
    with pytest.raises(NonFinite) as raised, Checkpoints(folder / "checkpoints", OPTIONS, 0, 1) as checkpoints:
        loop(checkpoints, Steps(poisoned=4), 3).run(0)
    assert raised.value.losses is not None
    found = list_checkpoints(folder / "checkpoints")
    soundness = {step: open_saved(path).meta["soundness"] for step, path in found.items()}
    said = describe_way_back(folder, raised.value.step, raised.value.losses)
    return {"message": str(raised.value), "soundness": soundness, "said": said}


OPTIONS = CheckpointOptions(every_steps=2, keep_last=9)


def scenarios(folder: Path) -> dict[str, Any]:
    whole = run(folder / "whole", 2)
    stopped = run(folder / "stopped", 9, stop_after=7)
    return {
        "whole": whole,
        "stopped": stopped,
        "fewer": run(folder / "stopped", 2, resume=True),
        "at its end": run(folder / "whole", 2, resume=True, stop_after=0),
        "more": run(folder / "whole", 3, resume=True),
        "diverged": diverges(folder / "diverged"),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(1, scenarios, tmp_path_factory.mktemp("loop"), timeout=120.0)[0]


def test_an_end_is_reached(found: dict[str, Any]) -> None:
    assert found["whole"] == {"finished": True, "steps": [*range(6)], "done": 6, "saved": [1, 2, 3, 4, 5, 6]}
    assert found["at its end"] == {"finished": True, "steps": [], "done": 6, "saved": [1, 2, 3, 4, 5, 6]}


def test_more_epochs_go_on_and_fewer_than_are_done_end_at_once(found: dict[str, Any]) -> None:
    assert found["more"] == {"finished": True, "steps": [6, 7, 8], "done": 9, "saved": [*range(1, 10)]}
    assert found["stopped"]["finished"] is False
    assert found["stopped"]["saved"] == [*range(1, found["stopped"]["done"] + 1)]
    assert found["fewer"] == found["stopped"] | {"finished": True, "steps": []}


def test_a_checkpoint_records_whether_its_weights_are_finite_and_its_losses(found: dict[str, Any]) -> None:
    recorded = found["diverged"]["soundness"]
    assert [*recorded] == [2, 4]
    assert all(record["weights_finite"] and 0 < record["loss"] < 200 for record in recorded.values())


def test_a_loss_that_is_not_finite_names_the_checkpoint_to_go_on_from(found: dict[str, Any]) -> None:
    assert "good" not in found["diverged"]["message"]
    said = found["diverged"]["said"]
    assert "is step-00000002 (passed over: step-00000004: its weights gave what is not finite)" in said
    assert said.endswith("--from 2")
