"""Describes what a checkpoint records of its weights and losses, to tell whether a training can go on from it."""

from typing import Any

from pydantic import BaseModel, ValidationError

KEY = "soundness"  # in a checkpoint's meta
WINDOW = 1000  # steps whose losses are kept
FACTOR, SLACK = 2.0, 1.0  # a loss is in its range up to FACTOR times the usual one, and SLACK more for small ones


class Soundness(BaseModel):
    """What a checkpoint records of itself. weights_finite: no weight or buffer of rank 0 is infinite or no number;
    loss: of the last step before it, on rank 0; usual_loss: the median of up to WINDOW steps before it. None: no step
    has been done since the start or the resume."""

    weights_finite: bool
    loss: float | None
    usual_loss: float | None

    @property
    def limit(self) -> float:
        """The largest loss that is in its range."""
        return FACTOR * abs(self.usual_loss or 0.0) + SLACK

    def problem(self, after: list[float]) -> str | None:
        """The reason not to go on from the checkpoint, in words; None: there is none. after: the losses of the steps
        that followed it, as far as they are known."""
        if not self.weights_finite:
            return "some of its weights are not finite"
        if self.loss is None:
            return "it records no loss"
        for loss, of in ((self.loss, "its loss"), *((loss, "the loss after it") for loss in after)):
            if not loss <= self.limit:  # true of NaN as well
                return f"{of} was {loss:.4g}, and up to {self.limit:.4g} was in its range"
        return None


def recorded_soundness(meta: dict[str, Any]) -> Soundness:
    """What the checkpoint with this meta records; no loss where it is one of an earlier version."""
    try:
        return Soundness.model_validate(meta[KEY])
    except (KeyError, ValidationError):
        return Soundness(weights_finite=True, loss=None, usual_loss=None)
