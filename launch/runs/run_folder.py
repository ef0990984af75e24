"""Makes run folders, finds them by name, and keeps the state of a run in state.json."""

import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.data.files import (
    describe_os_error,
    lock_file,
    read_model,
    refusing_os_errors,
    write_state,
    write_whole,
)
from kilobatch.launch.runs import job_history
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
    """Recipe section `run`.

    requeue: how often a job goes back to the queue by itself.
    """

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
EvaluationStatus = Literal["finished", "failed"]


def _utc_time(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"'{text}' has no time zone")
    return text


Time = Annotated[str, AfterValidator(_utc_time)]


class State(BaseModel):
    """state.json. Times are ISO 8601, UTC; pid is the launcher's, on `host`; evaluation: of a run that has finished,
    how its evaluators have ended (evaluation.json says more); None: there were none."""

    status: Status
    pid: int
    host: str
    workers: int = Field(ge=1)
    started: Time
    updated: Time
    evaluation: EvaluationStatus | None = None


def create_run(options: RunOptions, recipe_name: str, recipe_yaml: str, workers: int) -> Path:
    """Makes a new run folder with the resolved recipe and a state in it.

    `runs/<recipe>-<YYYYmmdd-HHMMSS>`, or `runs/<run.name>`. Raises UserError where that name is taken or the folder
    cannot be written.
    """
    try:
        folder = new_run_path(options, recipe_name)
        folder.mkdir(parents=True, exist_ok=options.name is not None)
        for name in ("checkpoints", "logs", "pictures"):
            (folder / name).mkdir()
        write_whole(folder / "recipe.yaml", [recipe_yaml.encode()])
        set_status(folder, "new", workers)
    except OSError as error:
        where = f"run.folder '{options.folder}'"
        raise UserError(f"{where}: no run folder can be made there: {describe_os_error(error)}") from error
    return folder


def new_run_path(options: RunOptions, recipe_name: str) -> Path:
    """The path of a new run's folder. Raises UserError where that name is taken."""
    if options.name is None:
        return _unused(Path(options.folder), recipe_name)
    folder = Path(options.folder) / options.name
    content = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if content:
        way_out = f"kilobatch resume {folder}" if "recipe.yaml" in content else "or remove it"
        raise UserError(f"run.name '{options.name}': {folder} is not empty; choose another name, {way_out}")
    return folder


def _unused(parent: Path, recipe_name: str) -> Path:
    stamp = f"{recipe_name}-{datetime.now():%Y%m%d-%H%M%S}"
    tries = (parent / (stamp if n == 1 else f"{stamp}-{n}") for n in count(1))
    return next(path for path in tries if not path.exists())


def candidate_paths(name: str) -> tuple[Path, Path]:
    """The folders that a user may mean by the path of a run, a sweep or a pipeline, or by its name under runs/."""
    return Path(name), FOLDER / name


def find_run(run: str, others: Iterable[str] = ()) -> Path:
    """The folder of a run given as a folder or as a name under runs/. Raises UserError where there is none.

    others: names that the caller takes as well, for the message.
    """
    for folder in candidate_paths(run):
        if (folder / "recipe.yaml").is_file():
            return folder
    for folder in candidate_paths(run):
        if folder.exists():
            raise UserError(f"{folder} is not a run: it holds no recipe.yaml")
    runs = [*(path.parent.name for path in FOLDER.glob("*/recipe.yaml")), *others]
    hint = did_you_mean(run, runs) if runs else f"; there are none in {FOLDER}/ yet (kilobatch train <recipe>)"
    raise UserError(f"there is no run '{run}'{hint}")


def read_state(folder: Path) -> State:
    """The content of state.json. Raises UserError where it is missing or damaged."""
    path = folder / "state.json"
    try:
        return read_model(path, State, "remove it and give --workers to resume")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; is {folder} a whole run folder?") from error


def written_status(folder: Path) -> Status | None:
    """The status in state.json; None where there is no such file."""
    return read_state(folder).status if (folder / "state.json").exists() else None


def status(folder: Path, job: JobState | None = None) -> Status:
    """The status in state.json; "interrupted" for a run whose launcher was killed, whatever it wrote last.

    job: the scheduler's answer about a submitted run; None: the scheduler is asked, if that matters. Raises UserError
    where it does not answer.
    """
    if (written := written_status(folder)) is None:
        return "interrupted"
    if written not in ("queued", "running"):
        return written
    if submitted := job_history.read_job_file(folder):
        job = job or scheduler_of(submitted.cluster).states([submitted.job_id])[submitted.job_id]
        match job.state:
            case "queued":
                return "queued"
            case "running" | "ending":
                return "running"
            case "cancelled":
                return "cancelled"
        if (folder / "cancelled").exists():  # before it began, and the scheduler does not know it any more
            return "cancelled"
    try:
        with locked(folder):
            return "interrupted"
    except UserError:
        return "running"


def set_status(folder: Path, status: Status, workers: int, evaluation: EvaluationStatus | None = None) -> None:
    """Writes state.json as a whole; `started` keeps its first value."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    path = folder / "state.json"
    started = read_state(folder).started if path.exists() else now
    new = State(
        status=status,
        pid=os.getpid(),
        host=socket.gethostname(),
        workers=workers,
        started=started,
        updated=now,
        evaluation=evaluation,
    )
    write_state(path, new.model_dump_json(indent=2).encode() + b"\n")


class Locked(UserError):
    """Another process trains in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks the run, so that two launchers never train in one folder. The kernel frees the lock when the process ends,
    however it ends. File systems of some clusters have no locks: there, only the scheduler prevents a second launcher.

    Raises Locked where another process holds the lock, and UserError where its file cannot be written.
    """
    path = folder / ".lock"
    with refusing_os_errors(path):
        file = path.open("w")
    with file as lock:
        try:
            lock_file(lock, wait=False)
        except BlockingIOError as error:
            now = read_state(folder)
            raise Locked(f"{folder} is running (process {now.pid} on {now.host}); stop that one first") from error
        yield
