"""Options of a recipe's data: sources, batch, views and labels."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class LongTailed(BaseModel):
    """A long-tailed part of the training images, as LDAM makes of CIFAR (Cao et al. 2019, arxiv.org/abs/1906.07413).

    Of class i of C, in the order of their numbers, n_i images are kept: n_i = n_max x ratio^(-i / (C - 1)), or, as
    steps, n_max of the first half of the classes and n_max / ratio of the others; rounded down, one at least. n_max is
    the most that every class has enough images for. It is another data set: the same images in every epoch and for any
    run.seed, and k-NN and linear probes learn from no others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: Annotated[
        float, Field(gt=1, le=1e6, description="images of the largest class over those of the smallest")
    ] = 100.0
    form: Annotated[
        Literal["exponential", "step"], Field(description="how classes shrink: each by one factor, or in two halves")
    ] = "exponential"
    seed: Annotated[
        int, Field(ge=0, lt=2**63, description="which of a class's images; it has nothing to do with run.seed")
    ] = 0


class OrderOptions(BaseModel):
    """What an epoch shows, where that is made of labels. An epoch has as many batches as without.

    An image that comes again in an epoch gets views of its own. Both orders go with a long-tailed part, not with each
    other.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    long_tailed: Annotated[
        LongTailed | None, Field(description="trains on a long-tailed part of the images; null: on all")
    ] = None
    class_balanced: Annotated[
        bool,
        Field(description="each class equally often, to one image; a class's images come again once all have been"),
    ] = False
    images_per_class: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="K: each batch has K images of each of P = data.batch / K classes, side by side; null: any"),
    ] = None

    @model_validator(mode="after")
    def one_order(self) -> Self:
        if self.class_balanced and self.images_per_class is not None:
            raise ValueError(
                f"class_balanced and images_per_class {self.images_per_class} are two orders of the same images; "
                "use class_balanced=false or images_per_class=null"
            )
        return self

    @property
    def by_class(self) -> str | None:
        """The option by which an epoch's order is made of labels; None: it is not."""
        if self.class_balanced:
            return "data.order.class_balanced"
        return None if self.images_per_class is None else f"data.order.images_per_class {self.images_per_class}"


def order_problem(order: OrderOptions | None, batch: int, classes: int | None, unlabelled: int) -> str | None:
    """Says why batches cannot be made in such an order, and the way out; None: they can.

    classes: that have images; None: not known; unlabelled: how many of the images have no label.
    """
    if order is None or order.by_class is None:
        return None
    if unlabelled:
        return (
            f"{order.by_class} takes images by their labels, and {unlabelled:,} of them have none; use "
            "data.unlabelled=drop, which leaves these out, or data.labels.share=1"
        )
    if (images := order.images_per_class) is None:
        return None
    if batch % images:
        near = " or ".join(f"{n}" for n in (batch // images * images, -(-batch // images) * images) if n)
        return f"{order.by_class} does not divide data.batch {batch}; use a data.batch of {near}, or a divisor of it"
    if classes is not None and batch // images > classes:
        return (
            f"{order.by_class} makes data.batch {batch} of {batch // images} classes, and {classes} have images; use "
            f"data.batch={classes * images} at most, or data.order.images_per_class={-(-batch // classes)} or more"
        )
    return None


class DataOptions(BaseModel):
    """Recipe section `data`.

    train: the training images: a .beton or a source, as folder:PATH, list:FILE, tar:PATTERN, digits. test: the test
    images, likewise; null: nothing is evaluated. batch: images of a step, over all ranks. views: what is made of each
    image: one group of views, or a list of groups, each of its own size, from one decoding; all are normalised as the
    first. labels: which training images have labels. order: which images an epoch shows, by their labels; null: all of
    them, shuffled. threads: of each worker's loader; null: its share of the processors.
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
    order: OrderOptions | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None

    @property
    def groups(self) -> tuple[Views, ...]:
        """The groups of views, mostly one. Evaluators prepare images as the first says."""
        return groups_of(self.views)

    @property
    def sizes(self) -> list[int]:
        """Pixels of the sides of the groups' views."""
        return [group.size for group in self.groups]
