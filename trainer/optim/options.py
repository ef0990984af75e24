"""Recipe section `optimizer`. Loads no torch."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Beta = Annotated[float, Field(ge=0, lt=1)]
Dialect = Literal["google", "bolts", "larc"]


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
