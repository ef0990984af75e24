"""Run folders: made once, found by name, their state told by state.json."""

import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from kilobatch.data.errors import Refusal, did_you_mean
from kilobatch.data.files import in_words, write_whole
from kilobatch.launch.runs import job_history as ledger
from kilobatch.launch.runs.requeue import RequeueOptions
from kilobatch.launch.schedulers.scheduler import JobState
from kilobatch.launch.schedulers.select import scheduler_of

FOLDER = Path("runs")


def _folder_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(
            f"'{name}' is no name for a run; use letters, digits, '.', '_' and '-' (run.folder is the path)"
        )
    return name


class RunOptions(BaseModel):
    """Recipe section `run`."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, AfterValidator(_folder_name)] | None = Field(
        default=None, description="the run's folder; by default the recipe's name and the time"
    )
    folder: str = Field(default="runs", min_length=1, description="where run folders are made")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of weights, order and views")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="auto: cuda where there is one")
    log_every: int = Field(default=10, ge=1, description="steps between two lines of metrics.jsonl")
    stall_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=30, description="without a sign of life of any worker, until all stacks are logged and the run ends"
    )
    requeue: RequeueOptions = RequeueOptions()


Status = Literal["new", "queued", "running", "finished", "failed", "interrupted", "cancelled"]


class State(BaseModel):
    """state.json. Times are ISO 8601, UTC; pid is the launcher's, on `host`."""

    status: Status
    pid: int
    host: str
    workers: int
    started: str
    updated: str


def create(options: RunOptions, recipe_name: str, recipe_yaml: str, workers: int) -> Path:
    """A new run folder with the resolved recipe and a state in it.

    `runs/<recipe>-<YYYYmmdd-HHMMSS>`, or `runs/<run.name>`. Raises Refusal where that name is taken or the folder
    cannot be written.
    """
    try:
        folder = place(options, recipe_name)
        folder.mkdir(parents=True, exist_ok=options.name is not None)
        for name in ("checkpoints", "logs", "pictures"):
            (folder / name).mkdir()
        write_whole(folder / "recipe.yaml", [recipe_yaml.encode()])
        set_status(folder, "new", workers)
    except OSError as error:
        where = f"run.folder '{options.folder}'"
        raise Refusal(f"{where}: no run folder can be made there: {in_words(error)}") from error
    return folder


def place(options: RunOptions, recipe_name: str) -> Path:
    """Where a new run's folder will be. Raises Refusal where that name is taken."""
    if options.name is None:
        return _unused(Path(options.folder), recipe_name)
    folder = Path(options.folder) / options.name
    taken = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if taken:
        way = f"kilobatch resume {folder}" if "recipe.yaml" in taken else "or remove it"
        raise Refusal(f"run.name '{options.name}': {folder} is not empty; choose another name, {way}")
    return folder


def _unused(parent: Path, recipe_name: str) -> Path:
    stamp = f"{recipe_name}-{datetime.now():%Y%m%d-%H%M%S}"
    tries = (parent / (stamp if n == 1 else f"{stamp}-{n}") for n in count(1))
    return next(path for path in tries if not path.exists())


def places(name: str) -> tuple[Path, Path]:
    """Where a run, a sweep or a pipeline given as a folder or as a name under runs/ may lie."""
    return Path(name), FOLDER / name


def find(run: str) -> Path:
    """The folder of a run given as a folder or as a name under runs/. Raises Refusal where there is none."""
    for folder in places(run):
        if (folder / "recipe.yaml").is_file():
            return folder
    for folder in places(run):
        if folder.exists():
            raise Refusal(f"{folder} is not a run: it holds no recipe.yaml")
    known = [path.parent.name for path in FOLDER.glob("*/recipe.yaml")]
    hint = did_you_mean(run, known) if known else f"; there are none in {FOLDER}/ yet (kilobatch train <recipe>)"
    raise Refusal(f"there is no run '{run}'{hint}")


def state(folder: Path) -> State:
    """What state.json says. Raises Refusal where it is missing or damaged."""
    path = folder / "state.json"
    try:
        return State.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise Refusal(f"{path} is missing; is {folder} a whole run folder?") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise Refusal(f"{path} is damaged ({first['msg']}); remove it and give --workers to resume") from error


def status(folder: Path, job: JobState | None = None) -> Status:
    """As state.json says; a run whose launcher was killed is interrupted, whatever was written last.

    job: what the scheduler says of a submitted run; None: it is asked, if that matters. Raises Refusal where it does
    not answer.
    """
    if not (folder / "state.json").exists():
        return "interrupted"
    written = state(folder).status
    if written not in ("queued", "running"):
        return written
    if submitted := ledger.job_file(folder):
        job = job or scheduler_of(submitted.cluster).states([submitted.job_id])[submitted.job_id]
        match job.state:
            case "queued":
                return "queued"
            case "running" | "ending":
                return "running"
            case "cancelled":
                return "cancelled"
        if (folder / "cancelled").exists():  # before it began; and the scheduler has forgotten it
            return "cancelled"
    try:
        with claimed(folder):
            return "interrupted"
    except Refusal:
        return "running"


def set_status(folder: Path, status: Status, workers: int) -> None:
    """Writes state.json as a whole; `started` stays that of the first time."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    path = folder / "state.json"
    started = state(folder).started if path.exists() else now
    new = State(
        status=status, pid=os.getpid(), host=socket.gethostname(), workers=workers, started=started, updated=now
    )
    write_whole(path, [new.model_dump_json(indent=2).encode(), b"\n"])


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds the run: two launchers never train in one folder. The lock goes with the process, however it ends. Some
    clusters' file systems have none: there, the scheduler alone sees to it.

    Raises Refusal where another process holds it.
    """
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            now = state(folder)
            raise Refusal(f"{folder} is running (process {now.pid} on {now.host}); stop that one first") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        yield
