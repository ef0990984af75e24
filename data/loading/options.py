"""Options of a recipe's data: sources, batch, views and labels."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kilobatch.data.views.groups import ViewOptions, groups_of
from kilobatch.data.views.options import Views


class LabelOptions(BaseModel):
    """Which training images have labels: a class-balanced share of them, chosen by the seed, or those of a list. They
    are for what trains on labels; evaluators (knn, linear) read the labels of all training images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: Annotated[
        float,
        Field(gt=0, le=1, description="of the training images, the same number in each class, at least one; 0.01: 1 %"),
    ] = 1.0
    seed: Annotated[
        int, Field(ge=0, lt=2**63, description="which ones; a smaller share is part of a larger one of the same seed")
    ] = 0
    list: Annotated[
        str | None,
        Field(min_length=1, description="instead of a share: a text file, the name of an image in each line"),
    ] = None

    @property
    def all(self) -> bool:
        return self.list is None and self.share == 1


class DataOptions(BaseModel):
    """Recipe section `data`.

    train: the training images: a .beton or a source, as folder:PATH, cifar10:PATH, npz:PATH, digits. test: the test
    images, likewise; null: nothing is evaluated. batch: images of a step, over all ranks. views: what is made of each
    image: one group of views, or a list of groups, each of its own size, from one decoding; all are normalised as the
    first. labels: which training images have labels. threads: of each worker's loader; null: its share of the
    processors.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str = "digits"
    test: str | None = "digits"
    batch: Annotated[int, Field(ge=1)] = 512
    views: ViewOptions = Views()
    labels: LabelOptions = LabelOptions()
    unlabelled: Annotated[
        Literal["keep", "drop"], Field(description="images without a label: kept for training, or left out of it")
    ] = "keep"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None

    @property
    def groups(self) -> tuple[Views, ...]:
        """The groups of views, mostly one. Evaluators prepare images as the first says."""
        return groups_of(self.views)
