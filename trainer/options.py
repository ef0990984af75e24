"""What a recipe may say about engine, optimizer and checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Beta = Annotated[float, Field(ge=0, lt=1)]
Dialect = Literal["google", "bolts", "larc"]


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


class OptimizerOptions(BaseModel):
    """Recipe section `optimizer`. An option that the named optimizer does not have is without effect."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["lars", "sgd", "adamw", "lamb"] = "lars"
    lr: float = Field(default=4.8, gt=0, allow_inf_nan=False, description="before scaling")
    scaling: Literal["none", "linear", "sqrt"] = Field(
        default="none", description="linear: lr·B/256; sqrt: lr·√B; B global"
    )
    weight_decay: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    momentum: float = Field(default=0.9, ge=0, lt=1, description="lars, sgd")
    nesterov: bool = Field(default=False, description="lars, sgd")
    dialect: Dialect = Field(default="google", description="lars: where the learning rate stands")
    trust_coefficient: float = Field(default=0.001, gt=0, allow_inf_nan=False, description="lars")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="adamw, lamb")
    epsilon: float = Field(default=1e-8, gt=0, description="adamw, lamb")

    @model_validator(mode="after")
    def nesterov_has_momentum(self) -> Self:
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("nesterov true with momentum 0: sgd has nothing to look ahead with; use momentum 0.9, say")
        return self


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
