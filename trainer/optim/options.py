"""Recipe section `optimizer`. Loads no torch."""

from math import sqrt
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Beta = Annotated[float, Field(ge=0, lt=1)]
Dialect = Literal["google", "bolts", "larc", "byol"]


class OptimizerOptions(BaseModel):
    """Recipe section `optimizer`. An option that the named optimizer does not have is without effect.

    name: the optimizer. weight_decay: the share of each weight that is taken away, times the learning rate.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["lars", "sgd", "adamw", "lamb"] = "lars"
    lr: float = Field(
        default=4.8, gt=0, allow_inf_nan=False, description="the learning rate after the warm-up, before scaling"
    )
    scaling: Literal["none", "linear", "sqrt"] = Field(
        default="none", description="linear: lr·B/256; sqrt: lr·√B; B global"
    )
    weight_decay: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    final_weight_decay: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="what weight_decay goes to by a cosine, until the end; null: it stays",
    )
    decay_norms: bool = Field(
        default=False,
        description="whether norms and biases are decayed, too, as in MoCo's, lemniscate's, lightly's code",
    )
    freeze: tuple[str, ...] = Field(
        default=(),
        description="parts that are not trained, by the beginnings of their parameters' names, such as encoder.layer1; "
        "the running statistics of their norms go on",
    )
    layer_decay: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="the factor of the learning rate from each part of the encoder to the one before it; the last "
        "part's own; 1: one rate for all",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="lars, sgd: the weight of the steps before")
    nesterov: bool = Field(default=False, description="lars, sgd: look ahead by the momentum")
    dialect: Dialect = Field(
        default="google", description="lars: where the learning rate stands, and what the ratio is of"
    )
    trust_coefficient: float = Field(
        default=0.001, gt=0, allow_inf_nan=False, description="lars: a layer's step, as a share of its norm"
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), description="adamw, lamb: weights of the earlier means and squares"
    )
    epsilon: float = Field(default=1e-8, gt=0, description="adamw, lamb: added to the root of the squares")

    @model_validator(mode="after")
    def nesterov_has_momentum(self) -> Self:
        if self.name == "sgd" and self.nesterov and not self.momentum:
            raise ValueError("nesterov true with momentum 0: sgd has nothing to look ahead with; use momentum 0.9, say")
        return self


def scaled_lr(options: OptimizerOptions, global_batch: int) -> float:
    """The base learning rate of the schedule. SimCLR's 0.3·B/256 and 0.075·√B are equal at B = 4096 (section B.1)."""
    factors = {"none": 1.0, "linear": global_batch / 256, "sqrt": sqrt(global_batch)}
    return options.lr * factors[options.scaling]
