"""Decides whether a job may be requeued: bounds on the number of requeues, one for each kind of end."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field

from kilobatch.launch.runs.job_history import Attempt, count_ends


class RequeueOptions(BaseModel):
    """Recipe section `run.requeue`: how often a job goes back to the queue by itself before it stops."""

    model_config = ConfigDict(extra="forbid")

    preemptions: int = Field(default=1000, ge=0, description="ends by the scheduler or a signal, before the time limit")
    timeouts: int = Field(default=1000, ge=0, description="ends by the time limit")
    crashes: int = Field(default=3, ge=0, description="workers that failed or hung; the same step twice stops at once")
    node_failures: int = Field(default=10, ge=0, description="nodes that went down or fell silent")


def reason_to_stop(attempts: Sequence[Attempt], options: RequeueOptions) -> str | None:
    """The reason why a job may not be requeued after the last of these attempts; None: it may be.

    A crash at the same step as the crash before it will come again, and so will a time limit that twice in a row ends
    the run at the same step.
    """
    last = attempts[-1]
    if last.reason in ("refused", "cancelled"):
        return last.reason
    before = next((attempt for attempt in reversed(attempts[:-1]) if attempt.reason == last.reason), None)
    again = before is not None and last.step is not None and before.step == last.step
    if again and last.reason == "crashed":
        return f"it crashed twice at the same step: the last one known is {last.step}"
    if again and last.reason == "timed_out" and before == attempts[-2]:
        return f"two time limits in a row ended it at step {last.step}: give it more --time"
    for name, count in count_ends(attempts).model_dump().items():
        bound = getattr(options, name)
        if count > bound:
            return f"{name.replace('_', ' ')}: {count}, and run.requeue.{name} allows {bound}"
    return None
