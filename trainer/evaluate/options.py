"""Recipe section `evaluate`. Loads no torch."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Evaluator = Literal["knn", "linear", "fast_linear", "moved", "picture", "classify", "classify_moved"]
CLASSIFYING: tuple[Evaluator, ...] = ("classify", "classify_moved")  # they need a method with a classifier


Positive = Annotated[float, Field(gt=0)]
AtLeastZero = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class KNNOptions(_Options):
    """Weighted k-NN (Wu et al. 2018): k neighbours, each voting with exp(cosine / temperature)."""

    k: Count = 200
    temperature: Positive = 0.07


class LinearOptions(_Options):
    """The papers' linear protocol (SimCLR, appendix B.6). lr is per 256 samples of the global batch."""

    epochs: Count = 90
    lr: Positive = 0.1
    batch: Count = 256
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: AtLeastZero = 0.0


class FastLinearOptions(_Options):
    """Softmax regression on cached features: l2 / 2 · |W|² beside the mean cross-entropy."""

    l2: Positive = 1e-3
    iterations: Count = 200


class EvaluateOptions(_Options):
    """Recipe section `evaluate`. every_epochs: how often `during` runs while training (0: never); final: what runs when
    it has ended."""

    every_epochs: Annotated[int, Field(ge=0)] = 1
    during: Evaluator = "knn"
    knn: KNNOptions = KNNOptions()
    linear: LinearOptions = LinearOptions()
    fast_linear: FastLinearOptions = FastLinearOptions()
    final: tuple[Evaluator, ...] = ("knn", "fast_linear")
