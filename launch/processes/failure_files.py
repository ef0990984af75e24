"""Files in a run's logs/ that tell of a failure: each rank's error, and what torch's flight recorder has dumped.

logs/rank-K.error.json   the error that ended rank K, as torchelastic's @record writes it, with a finer time
logs/flight-recorder-K   the last collectives of rank K, pickled, for torchfrtrace
logs/earlier/TIME-…      those of earlier starts of the workers
"""

import time
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
# The names since torch 2.9, and the older ones, which torch still heeds: a user may have set either.
DUMP_PREFIX = "TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"
_DUMP_ON_TIMEOUT = "TORCH_FR_DUMP_ON_TIMEOUT", "TORCH_NCCL_DUMP_ON_TIMEOUT"
_COLLECTIVES = "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"
_EARLIER = "earlier"


class ErrorDetails(BaseModel):
    """timestamp: in whole seconds, as torchelastic reads it; time: the same with its fraction; exit_code: of the
    worker, once it ends."""

    model_config = ConfigDict(frozen=True)

    py_callstack: str
    timestamp: str
    time: float
    exit_code: int


class ErrorMessage(BaseModel):
    """message: the error's type and text."""

    model_config = ConfigDict(frozen=True)

    message: str
    extraInfo: ErrorDetails  # noqa: N815 (torchelastic's name)


class ErrorFile(BaseModel):
    """The content of an error file."""

    model_config = ConfigDict(frozen=True)

    message: ErrorMessage


def error_path(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank}.error.json"


def error_file_of(error: BaseException, stack: str, exit_code: int) -> ErrorFile:
    """The content for an error that was raised just now."""
    now = time.time()
    details = ErrorDetails(py_callstack=stack, timestamp=str(int(now)), time=now, exit_code=exit_code)
    return ErrorFile(message=ErrorMessage(message=f"{type(error).__name__}: {error}", extraInfo=details))


def read_error(path: Path) -> ErrorMessage | None:
    """The error in this file; None where there is none that can be read: the log has the error as well."""
    try:
        return ErrorFile.model_validate_json(path.read_bytes()).message
    except (OSError, ValidationError):
        return None


def flight_recorder_variables(logs: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Variables with which torch's flight recorder keeps a worker's last collectives, and dumps them into `logs` when
    one times out. given: the environment; what it says already, by either name, stays."""
    wanted = {DUMP_PREFIX: f"{logs.absolute()}/flight-recorder-", _DUMP_ON_TIMEOUT: "1", _COLLECTIVES: "2000"}
    return {names[0]: value for names, value in wanted.items() if not any(name in given for name in names)}


def flight_recorder_files(logs: Path) -> list[Path]:
    return sorted(logs.glob("flight-recorder-*"), key=lambda path: (len(path.name), path.name))


def set_aside(logs: Path, ranks: Iterable[int]) -> None:
    """Moves the files of these ranks that an earlier start of the workers has left to logs/earlier/, under the time at
    which they were written: so that they are not taken for this start's."""
    for rank in ranks:
        for path in (error_path(logs, rank), logs / f"flight-recorder-{rank}"):
            if path.exists():
                (logs / _EARLIER).mkdir(exist_ok=True)
                written = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y%m%dT%H%M%SZ")
                path.rename(logs / _EARLIER / f"{written}-{path.name}")
