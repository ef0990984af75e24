"""A diverged training is told which checkpoint to go back to, by what each records and by the losses since."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.shard import Piece
from kilobatch.trainer.checkpoint.soundness import WINDOW, Soundness
from kilobatch.trainer.divergence import LossHistory, describe_way_back
from tests.helpers.sample_checkpoints import save

SOUND = Soundness(weights_finite=True, loss=4.5, usual_loss=4.0)


def history(losses: dict[int, float]) -> LossHistory:
    kept = LossHistory()
    for step, loss in losses.items():
        kept.note(step, torch.tensor(loss))
    return kept


def test_the_last_losses_are_kept() -> None:
    kept = history({step: float(step) for step in range(5, WINDOW + 20)})
    assert kept.of(0, 10**6) == [float(step) for step in range(20, WINDOW + 20)]
    assert kept.of(WINDOW + 18, WINDOW + 30) == [WINDOW + 18.0, WINDOW + 19.0]
    assert kept.of(0, 20) == [] == LossHistory().of(0, 10)


@pytest.mark.parametrize(("value", "finite"), [(1e30, True), (float("inf"), False), (float("nan"), False)])
def test_weights_that_are_large_are_finite(value: float, finite: bool) -> None:
    def pieces(**tensors: Tensor) -> dict[str, Piece]:
        return {f"method.{name}": Piece.of(tensor) for name, tensor in tensors.items()}

    held = pieces(a=torch.ones(3), b=torch.tensor([1.0, value]), count=torch.tensor(3))
    found = history({0: 3.0, 1: 1.0, 2: 2.0}).soundness(3, held)
    assert found == Soundness(weights_finite=finite, loss=2.0, usual_loss=2.0)


def test_a_loss_is_in_its_range_up_to_twice_the_usual_one() -> None:
    assert SOUND.problem([4.4, 9.0]) is None
    assert SOUND.problem([4.4, 9.1]) == "the loss after it was 9.1, and up to 9 was in its range"
    assert Soundness(weights_finite=True, loss=1e9, usual_loss=4.0).problem([]) is not None
    assert Soundness(weights_finite=True, loss=0.9, usual_loss=1e-6).problem([]) is None, "noise of a small loss"
    assert Soundness(weights_finite=False, loss=4.5, usual_loss=4.0).problem([]) is not None


def test_the_newest_sound_checkpoint_is_named_with_the_reasons(tmp_path: Path) -> None:
    assert describe_way_back(tmp_path, 9, LossHistory()) == "There is no checkpoint yet: start a new run"
    records = {
        10: {},
        20: {"soundness": SOUND.model_dump()},
        30: {"soundness": SOUND.model_dump()},
        40: {"soundness": SOUND.model_dump() | {"weights_finite": False}},
        50: {"soundness": SOUND.model_dump()},
    }
    for step, meta in records.items():
        save(tmp_path / "checkpoints", 1, step, CheckpointOptions(keep_last=9), meta)
    (tmp_path / "checkpoints" / "step-00000050" / "checkpoint.json").write_text("{}")
    said = describe_way_back(tmp_path, 45, history({step: 50.0 if step >= 33 else 4.0 for step in range(20, 45)}))
    assert "in its range is step-00000020 (passed over: step-00000050: it is damaged (" in said
    assert "; step-00000040: some of its weights are not finite; step-00000030: the loss after it was 50, " in said
    assert said.endswith(f"kilobatch resume {tmp_path} --from 20")
    alone = describe_way_back(tmp_path, 15, LossHistory())
    assert "step-00000010: it records no loss): start a new run, or choose one with: " in alone


def test_the_newest_sound_checkpoint_is_kept_while_a_training_diverges(tmp_path: Path) -> None:
    for step in range(1, 7):
        record = SOUND if step < 3 else SOUND.model_copy(update={"loss": 1e3})
        save(tmp_path, 1, step, CheckpointOptions(keep_last=2), {"soundness": record.model_dump()})
    assert [*list_checkpoints(tmp_path)] == [2, 5, 6]
    save(tmp_path, 1, 7, CheckpointOptions(keep_last=2), {"soundness": SOUND.model_dump()})
    assert [*list_checkpoints(tmp_path)] == [6, 7]
