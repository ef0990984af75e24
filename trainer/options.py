"""What a recipe may say about engine, optimizer and checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class EngineOptions(BaseModel):
    """Recipe section `engine`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="of autocast; parameters are always fp32"
    )
    zero: Literal[0, 1, 2] = Field(
        default=0,
        description="DeepSpeed's ZeRO stage; 1: a rank has its share of the optimizer's state; 2: and of the gradients",
    )
    chunks: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=1,
        description="parts that a rank's batch is computed in, for memory; same gradients; auto: the fewest that fit",
    )
    keep: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="chunks that keep their graph, so that only the rest run twice; auto: as many as memory allows",
    )
    clip: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="bound of the gradient's global norm; 0: none"
    )
    compile: bool = Field(default=False, description="torch.compile the method's networks")

    @field_validator("zero", mode="before")
    @classmethod
    def no_stage_3(cls, zero: object) -> object:
        if zero == 3:
            raise ValueError(
                "stage 3 cuts the parameters themselves, which evaluators, momentum encoders and exports read whole; "
                "use 2, with engine.chunks for the activations"
            )
        return zero

    @model_validator(mode="after")
    def no_fp16_in_parts(self) -> Self:
        if self.zero and self.precision == "fp16":
            raise ValueError(
                f"precision fp16 with zero {self.zero}: each rank would change its loss scale for itself; use "
                "precision bf16, or zero 0"
            )
        return self

    @model_validator(mode="after")
    def no_more_kept_than_chunks(self) -> Self:
        if self.keep != "auto" and self.chunks != "auto" and self.keep > self.chunks:
            raise ValueError(f"keep {self.keep} is more than chunks {self.chunks}; use at most that, or auto")
        return self
