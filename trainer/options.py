"""Recipe section `engine`, and the rules by which its options go with other sections. Loads no torch."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ZERO_OPTIMIZERS = ("lars", "sgd", "adamw")
Precision = Literal["fp32", "bf16", "fp16"]


class AdversarialOptions(BaseModel):
    """Recipe section `engine.adversarial`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    epsilon: float = Field(
        default=0.03, gt=0, allow_inf_nan=False, description="what a pixel of the normalised image is moved by"
    )
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="of the loss of first views and adversarial ones"
    )


class EngineOptions(BaseModel):
    """The engine's options: those of recipe section `engine`, with a precision that is decided."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    precision: Precision = "fp32"
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
    clip: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="bound of the gradient's norm; 0: none")
    clip_by: Literal["global", "tensor"] = Field(
        default="global",
        description="what clip bounds: the norm of all gradients together, or each tensor's, as DINO's",
    )
    compile: bool = Field(default=False, description="torch.compile the method's networks")
    adversarial: AdversarialOptions | None = Field(
        default=None,
        description="a further view: the first one moved against the loss (CLAE), for methods that compare any two "
        "views, such as simclr; null: none",
    )

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
    def no_compiled_attack(self) -> Self:
        if self.adversarial and self.compile:
            raise ValueError(
                "compile true with adversarial views: these go through norms of their own, which a compiled network "
                "does not know; use compile=false, or adversarial=null"
            )
        return self

    @model_validator(mode="after")
    def no_more_kept_than_chunks(self) -> Self:
        if self.keep != "auto" and self.chunks != "auto" and self.keep > self.chunks:
            raise ValueError(f"keep {self.keep} is more than chunks {self.chunks}; use at most that, or auto")
        return self


class EngineSection(EngineOptions):
    """Recipe section `engine`."""

    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="auto",
        description="of autocast; parameters are always fp32; auto: bf16 where all workers' devices have units for it, "
        "else fp32, and for the whole run as at its start",
    )

    def decided(self, precision: Precision) -> "EngineSection":
        """With this precision where it is auto."""
        return self.model_copy(update={"precision": precision}) if self.precision == "auto" else self

    def options(self) -> EngineOptions:
        """For an engine; the precision has to be decided."""
        return EngineOptions(**self.model_dump())


def zero_problem(zero: int, optimizer: str) -> str | None:
    """Says why the optimizer of this name does not work under this ZeRO stage, and the way out; None: it does.

    ZeRO gives an optimizer flat pieces of a group's parameters. That is right for one that updates element by element,
    and for LARS, which is told where the parameters lie in them.
    """
    if not zero or optimizer in ZERO_OPTIMIZERS:
        return None
    return (
        f"engine.zero {zero} with optimizer.name {optimizer}: it would take the norms of a rank's pieces for those of "
        "whole tensors; use engine.zero=0, or optimizer.name=lars, sgd or adamw"
    )


def chunks_problem(chunks: int, global_norm: bool, whole_batch: str = "") -> str | None:
    """Says why a rank's batch cannot be computed in so many chunks, and the way out; None: it can.

    global_norm: the encoder's BatchNorm takes statistics over the global batch; whole_batch: the method's own reason,
    a clause, if it has one.
    """
    if chunks > 1 and global_norm:
        return (
            f"engine.chunks {chunks} with encoder.norm global: global statistics need the whole batch at once, "
            "a chunk sees its part only; use engine.chunks=1 or encoder.norm=local"
        )
    return f"engine.chunks is {chunks}, but {whole_batch}; use engine.chunks=1" if chunks > 1 and whole_batch else None
