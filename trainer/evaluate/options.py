"""Recipe section `evaluate`. Loads no torch."""

from itertools import product
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kilobatch.data.views.options import Crop, Probability, Views
from kilobatch.trainer.optim.schedules import ScheduleOptions

Evaluator = Literal["knn", "linear", "fast_linear", "moved", "picture", "classify", "classify_moved"]
CLASSIFYING: tuple[Evaluator, ...] = ("classify", "classify_moved")  # they need a method with a classifier


Positive = Annotated[float, Field(gt=0)]
AtLeastZero = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]

FALL = 0.1  # factor of the rate at each milestone
# From a hundredth of SimCLR's 0.1 to three times MoCo's 30, each about three times the one before.
SEARCHED_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class KNNOptions(_Options):
    """Weighted k-NN (Wu et al. 2018).

    k: neighbours that vote; temperature: a neighbour votes with exp(cosine / temperature).
    """

    k: Count = 200
    temperature: Positive = 0.07


class LinearOptions(_Options):
    """A linear classifier by SGD on frozen features. The defaults are SimCLR's (appendix B.6).

    epochs: how many times the training images are seen. lr: the learning rate per 256 samples of the global batch; of
    several, which are tried in one pass over the images, the best on held-out training images is taken; search: those
    from 0.001 to 100. batch: samples of a step, over all ranks. momentum: of SGD. nesterov: whether it looks ahead by
    the momentum. weight_decay: as in the optimizer; of several, the best, as for lr. schedule: a cosine to 0, or steps:
    the rate is multiplied by 0.1 at each of the milestones. milestones: epochs after which it falls. crop: of the
    training images; null: torchvision's default, 0.08 to 1 of the area, where the recipe's views crop, else none. flip:
    their probability to be mirrored; null: as the recipe's views have it.
    """

    epochs: Count = 90
    lr: Positive | Annotated[tuple[Positive, ...], Field(min_length=1)] | Literal["search"] = 0.1
    batch: Count = 256
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = True
    weight_decay: AtLeastZero | Annotated[tuple[AtLeastZero, ...], Field(min_length=1)] = 0.0
    schedule: Literal["cosine", "steps"] = "cosine"
    milestones: tuple[Count, ...] = ()
    crop: Crop | None = None
    flip: Probability | None = None

    @model_validator(mode="after")
    def _fit_each_other(self) -> Self:
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError("schedule: steps and milestones go together; give both, such as milestones: [60, 80]")
        if any(milestone >= self.epochs for milestone in self.milestones):
            raise ValueError(f"milestones {list(self.milestones)} should lie below epochs ({self.epochs})")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov true with momentum 0: there is nothing to look ahead with; use nesterov=false")
        return self

    @property
    def rate_schedule(self) -> ScheduleOptions:
        """The schedule of the learning rate, whatever its first value."""
        return ScheduleOptions(
            epochs=self.epochs, warmup_epochs=0, name=self.schedule, milestones=self.milestones, factor=FALL
        )

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates to try."""
        if self.lr == "search":
            return SEARCHED_RATES
        return self.lr if isinstance(self.lr, tuple) else (self.lr,)

    @property
    def decays(self) -> tuple[float, ...]:
        """The weight decays to try."""
        return self.weight_decay if isinstance(self.weight_decay, tuple) else (self.weight_decay,)

    @property
    def grid(self) -> list[tuple[float, float]]:
        """(rate, decay) of each classifier to train."""
        return list(product(self.rates, self.decays))

    def protocol(self, views: Views) -> str:
        """The protocol in words, for those who read a result. views: those that the classifier learns from."""
        rates, decays = _listed(self.rates), _listed(self.decays)
        nesterov = "Nesterov " if self.nesterov else ""
        steps = f"x{FALL:g} after epochs {_listed(self.milestones)} of"
        falls = "a cosine over" if self.schedule == "cosine" else steps
        epochs = " epochs" if self.schedule == "cosine" else ""
        chosen = "; the best on held-out training images" if len(self.grid) > 1 else ""
        crops = "crops of {:g} to {:g} of the area".format(*views.crop.scale) if views.crop else "whole images"
        return (
            f"SGD on frozen features of {crops}, flipped with probability {views.flip:g}, lr {rates} per 256, {falls} "
            f"{self.epochs}{epochs}, batch {self.batch}, {nesterov}momentum {self.momentum:g}, decay {decays}{chosen}"
        )


def _listed(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values) if len(values) < 4 else f"{values[0]:g} to {values[-1]:g}"


class FastLinearOptions(_Options):
    """Softmax regression on cached features: l2 / 2 · |W|² beside the mean cross-entropy.

    l2: the weight of half of |W|², the squared weights. iterations: of L-BFGS, at most.
    """

    l2: Positive = 1e-3
    iterations: Count = 200


class EvaluateOptions(_Options):
    """Recipe section `evaluate`.

    every_epochs: how often `during` runs while training; 0: never. during: the evaluator that runs then. knn: options
    of k-NN. linear: options of the linear probe on augmented images. fast_linear: options of the linear probe on
    features that are computed once. final: the evaluators that run when training has ended.
    """

    every_epochs: Annotated[int, Field(ge=0)] = 1
    during: Evaluator = "knn"
    knn: KNNOptions = KNNOptions()
    linear: LinearOptions = LinearOptions()
    fast_linear: FastLinearOptions = FastLinearOptions()
    final: tuple[Evaluator, ...] = ("knn", "fast_linear")
