"""How a method's options name other runs."""

from typing import Annotated

from pydantic import Field

Reference = Annotated[
    str,
    Field(min_length=1, description="a run (its folder, or its name under runs/), a checkpoint, or an exported file"),
]
