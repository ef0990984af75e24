"""Whether a job may go on after it was ended: bounds on requeues, one for each kind of end."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from kilobatch.launch.runs.job_history import Attempt, counts


class RequeueOptions(BaseModel):
    """Recipe section `run.requeue`: how often a job goes back to the queue by itself before it stops."""

    model_config = ConfigDict(extra="forbid")

    preemptions: int = Field(default=1000, ge=0, description="ends by the scheduler or a signal, before the time limit")
    timeouts: int = Field(default=1000, ge=0, description="ends by the time limit")
    crashes: int = Field(default=3, ge=0, description="workers that failed or hung; the same step twice stops at once")
    node_failures: int = Field(default=10, ge=0, description="nodes that went down or fell silent")


def stopped(attempts: Sequence[Attempt], options: RequeueOptions) -> str | None:
    """Why a job with these attempts, in order, the last of them over, may not go on; None: it may.

    A crash at the step of the crash before it is one that will come again, and so is a time limit that twice leaves
    the run at the same step.
    """
    last = attempts[-1]
    if last.reason in ("refused", "cancelled"):
        return last.reason
    before = next((one for one in reversed(attempts[:-1]) if one.reason == last.reason), None)
    again = before is not None and last.step is not None and before.step == last.step
    if again and last.reason == "crashed":
        return f"it crashed twice at the same step: the last one known is {last.step}"
    if again and last.reason == "timed_out" and before == attempts[-2]:
        return f"two time limits in a row ended it at step {last.step}: give it more --time"
    for name, count in counts(attempts).model_dump().items():
        bound = getattr(options, name)
        if count > bound:
            return f"{name.replace('_', ' ')}: {count}, and run.requeue.{name} allows {bound}"
    return None
