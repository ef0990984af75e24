"""Record of what a run is, `identity.json`: its images, classes, recipe, versions, and the runs that it takes from.

It is written when a training begins. Whatever uses the run again compares with it; launch/recipes/changes.py does that.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from kilobatch.data.files import read_model, refusing_os_errors, write_whole
from kilobatch.methods.networks.weights.report import StartReport
from kilobatch.trainer.options import Precision

FILE = "identity.json"
FORMER_REFERENCES = "trained.json"  # in which earlier versions kept the references


class ImagesIdentity(BaseModel):
    """A .beton by its SHA-256, how many images it has, and the names of their classes in order; None: not known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: str
    samples: int
    classes: list[str] | None


class ReferenceIdentity(BaseModel):
    """What a reference to another run stood for: the folder of a checkpoint or a file, its step, the SHA-256 of its
    content (of a checkpoint: of its description, which holds those of all its files), and the names of the classes that
    it was trained on, in order; None: it does not say. loaded: of starting weights, once they were loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path
    step: int
    sha256: str
    classes: list[str] | None = None
    loaded: StartReport | None = None


class Change(BaseModel):
    """A value that is another one now; name: an option, or what else it is of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.name}: {self.old}, now {self.new}"


class AcceptedChanges(BaseModel):
    """Changes that a user has accepted. step: that of the checkpoint from which the training went on with them;
    data_sha256: of the data before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: int
    time: str
    data_sha256: str
    changes: list[Change]


class BranchOrigin(BaseModel):
    """The checkpoint that a run was branched from: the run's folder, the step, and the SHA-256 of its description."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: Path
    step: int
    sha256: str


class Identity(BaseModel):
    """The content of identity.json. After accepted changes, all values are the new ones.

    recorded: when, ISO 8601 in UTC; step: of the training at that time, more than 0 for a run that began before there
    was such a file; data_sha256: of the training images and of which of them have labels; recipe: resolved; sources:
    the SHA-256 of each file that the recipe names as FILE.py:NAME, by option; references: by the name that the recipe
    gives them; branched_from: None: it began by itself; precision: that the training began with, where the recipe has
    auto.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    recorded: str
    step: int
    train: ImagesIdentity
    data_sha256: str
    test: ImagesIdentity | None
    recipe: dict[str, Any]
    versions: dict[str, str]
    sources: dict[str, str] = {}
    references: dict[str, ReferenceIdentity] = {}
    accepted: list[AcceptedChanges] = []
    branched_from: BranchOrigin | None = None
    precision: Precision | None = None


def read_identity(run: Path) -> Identity | None:
    """The content of a run's identity.json; None: there is none. Raises UserError where it is damaged."""
    way_out = "put a copy back, or remove it to have what is there now recorded anew"
    try:
        return read_model(run / FILE, Identity, way_out, with_key=True)
    except FileNotFoundError:
        return None


def write_identity(run: Path, identity: Identity) -> None:
    """Writes identity.json, whole or not at all. Raises UserError where it cannot be written."""
    with refusing_os_errors(run / FILE):
        write_whole(run / FILE, [identity.model_dump_json(indent=1).encode(), b"\n"])


def read_references(run: Path) -> dict[str, ReferenceIdentity]:
    """What the run's references stood for when it began, by name; none before they were loaded. Raises UserError where
    the file is damaged."""
    identity = read_identity(run)
    if identity is not None and identity.references:
        return identity.references
    try:
        return read_model(run / FORMER_REFERENCES, dict[str, ReferenceIdentity], "start a new run")
    except FileNotFoundError:
        return {}


def add_reference(run: Path, where: str, found: ReferenceIdentity) -> None:
    """Writes what a reference stands for into the run's identity.json."""
    recorded = read_identity(run)
    assert recorded is not None, "a training records what it is before it loads anything"
    references = {**read_references(run), where: found}
    write_identity(run, recorded.model_copy(update={"references": references}))


def pin_precision(run: Path, found: Precision) -> Precision:
    """The precision that the run's training began with; `found`, which is written down, where it begins now."""
    recorded = read_identity(run)
    assert recorded is not None, "a training records what it is before it computes anything"
    if recorded.precision is None:
        write_identity(run, recorded.model_copy(update={"precision": found}))
    return recorded.precision or found
