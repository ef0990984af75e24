"""Finds the checkpoint to go back to when a training has diverged, by what each records of its weights and losses."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kilobatch.trainer.checkpoint.description import list_checkpoints, read_description
from kilobatch.trainer.checkpoint.shard import Piece
from kilobatch.trainer.checkpoint.soundness import WINDOW, Soundness, recorded_soundness

STEPS_AFTER = 10  # steps after a checkpoint whose losses are looked at as well, since its weights made them


class LossHistory:
    """This rank's losses of the last WINDOW steps. They stay on their device: noting one does not wait for it."""

    def __init__(self) -> None:
        self._losses: Tensor | None = None
        self._first = self._end = 0  # the steps whose losses are known

    def note(self, step: int, loss: Tensor) -> None:
        """Notes the loss of step number `step`, 0-dim."""
        if self._losses is None:
            self._losses = loss.new_zeros(WINDOW, dtype=torch.float32)
            self._first = step
        self._losses[step % WINDOW] = loss
        self._end = step + 1

    def of(self, first: int, end: int) -> list[float]:
        """The losses of the steps in [first, end), as far as they are known."""
        first, end = max(first, self._first, self._end - WINDOW), min(end, self._end)
        if self._losses is None or first >= end:
            return []
        steps = torch.arange(first, end, device=self._losses.device) % WINDOW
        return self._losses[steps].tolist()

    def soundness(self, step: int, pieces: Mapping[str, Piece]) -> Soundness:
        """What the checkpoint of `step` steps with these pieces is to record."""
        floats = [
            piece.tensor.isfinite().all()
            for name, piece in pieces.items()
            if name.startswith("method.") and piece.tensor.is_floating_point()
        ]
        losses = self.of(0, step)
        usual = float(torch.tensor(losses).median()) if losses else None
        finite = bool(torch.stack(floats).all()) if floats else True
        return Soundness(weights_finite=finite, loss=losses[-1] if losses else None, usual_loss=usual)


def describe_way_back(run: Path, failed_step: int, losses: LossHistory) -> str:
    """Names the newest checkpoint of a run whose weights are finite and whose loss was in its range, those that are
    passed over for it with the reasons, and the command that goes on from it; to be called when the loss or gradient of
    step number failed_step was not finite. Only descriptions are read, so it takes no time."""
    passed_over: list[str] = []
    for step, path in reversed(list_checkpoints(run / "checkpoints").items()):
        problem = _problem(path, step, failed_step, losses)
        if problem is None:
            others = f" (passed over: {'; '.join(passed_over)})" if passed_over else ""
            return (
                f"The newest checkpoint whose weights are finite and whose loss was in its range is {path.name}"
                f"{others}; go on from it with: kilobatch resume {run} --from {step}"
            )
        passed_over.append(f"{path.name}: {problem}")
    if not passed_over:
        return "There is no checkpoint yet: start a new run"
    return (
        f"There is no checkpoint whose weights are known to be finite and whose loss was in its range "
        f"({'; '.join(passed_over)}): start a new run, or choose one with: kilobatch resume {run} --from STEP"
    )


def _problem(path: Path, step: int, failed_step: int, losses: LossHistory) -> str | None:
    try:
        meta = read_description(path)["meta"]
    except (OSError, ValueError, KeyError) as error:
        return f"it is damaged ({error})"
    if step >= failed_step:
        return "its weights gave what is not finite"
    return recorded_soundness(meta).problem(losses.of(step, min(step + STEPS_AFTER, failed_step)))
