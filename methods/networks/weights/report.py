"""Report of what an encoder took from its starting weights, as a run keeps it and as it is said. Loads no torch."""

from pydantic import BaseModel, ConfigDict

NAMED = 3  # tensors whose names are given; of the others the number


class StartReport(BaseModel):
    """What an encoder took from a file. package: that wrote it; place: the encoder's in it; tensors: those that were
    loaded, with running statistics; share: of the encoder's parameters; left: names in the file; missing: the
    encoder's, which stay random; resized: positions of another grid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: str
    place: str
    tensors: int
    share: float
    left: list[str]
    missing: list[str]
    resized: list[str]

    def __str__(self) -> str:
        at = f", at {self.place}" if self.place else ""
        said = f"{self.package}{at}: {self.tensors} tensors loaded, {percent(self.share)} of the encoder's parameters"
        said += f"; left {names_of_some(self.left)}; missing {names_of_some(self.missing)}"
        return said + (f"; resized to this grid of patches {names_of_some(self.resized)}" if self.resized else "")


def percent(share: float) -> str:
    return f"{int(share * 1000) / 10:g} %"


def names_of_some(names: list[str]) -> str:
    """Their number, and the first names."""
    more = f", and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)}" + (f" ({', '.join(names[:NAMED])}{more})" if names else "")
