"""What a recipe may say about its data."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from data.views import Views


class DataOptions(BaseModel):
    """Recipe section `data`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    train: str = "digits"  # a .beton or a source, as folder:PATH, cifar10:, npz:PATH, digits
    test: str | None = "digits"  # likewise; null: nothing is evaluated
    batch: Annotated[int, Field(ge=1)] = 512  # the global one, over all ranks
    views: Views = Views()
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None  # of each worker; without: its share of the processors
