"""Recipe section `checkpoint`. Loads no torch."""

from pydantic import BaseModel, ConfigDict, Field


class CheckpointOptions(BaseModel):
    """Recipe section `checkpoint`: when checkpoints are made and which are kept."""

    model_config = ConfigDict(extra="forbid")

    every_steps: int | None = Field(default=None, ge=1, description="a checkpoint every so many steps")
    every_minutes: float | None = Field(
        default=10, gt=0, description="and whenever so many minutes have passed since the last"
    )
    keep_last: int = Field(default=2, ge=1, description="how many of the newest are kept")
    keep_every_steps: int | None = Field(
        default=None, ge=1, description="and for good: the first one of every so many steps"
    )
    timeout_minutes: float = Field(
        default=15, gt=0, description="how long a rank may take to write before the run stops"
    )
