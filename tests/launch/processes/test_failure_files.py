"""Error files that torchelastic can read as well, and the variables of torch's flight recorder."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from kilobatch.data.errors import UserError
from kilobatch.launch.processes import failure_files
from kilobatch.launch.worker.error_file import recording_error


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = failure_files.error_path(tmp_path, 3)
    monkeypatch.setenv(failure_files.ERROR_FILE, str(path))
    return path


def raise_in_context(error: Exception) -> None:
    with pytest.raises(type(error)), recording_error():
        raise error


def test_an_error_is_recorded_as_torchelastic_reads_it(path: Path):
    raise_in_context(ValueError("a bug"))
    error = failure_files.read_error(path)
    assert error is not None
    assert abs(error.extraInfo.time - time.time()) < 60
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=1, error_file=str(path))
    assert failure.timestamp == int(error.extraInfo.time)
    assert cast(Any, failure.message)["message"] == "ValueError: a bug"
    assert error.extraInfo.exit_code == 1


def test_a_refusal_has_its_own_exit_code(path: Path):
    raise_in_context(UserError("no room"))
    error = failure_files.read_error(path)
    assert error is not None and (error.message, error.extraInfo.exit_code) == ("UserError: no room", 2)


def test_the_first_error_stays(path: Path):
    with pytest.raises(RuntimeError), recording_error():
        try:
            with recording_error():
                raise ValueError("the cause")
        finally:
            raise RuntimeError("a consequence")
    error = failure_files.read_error(path)
    assert error is not None and error.message == "ValueError: the cause"


def test_a_file_that_cannot_be_written_hides_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv(failure_files.ERROR_FILE, str(tmp_path / "absent" / "error.json"))
    raise_in_context(ValueError("a bug"))
    monkeypatch.delenv(failure_files.ERROR_FILE)
    raise_in_context(ValueError("a bug"))


def test_files_that_tell_nothing(path: Path):
    assert failure_files.read_error(path) is None
    path.write_text("{}")
    assert failure_files.read_error(path) is None


def test_files_of_an_earlier_start_are_set_aside_by_their_time(tmp_path: Path):
    for name in ("rank-1.error.json", "flight-recorder-1", "rank-2.error.json", "rank-1.log"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1.8e9, 1.8e9))
    failure_files.set_aside(tmp_path, [0, 1])
    assert {path.name for path in tmp_path.iterdir()} == {"earlier", "rank-2.error.json", "rank-1.log"}
    earlier = {path.name: path.read_text() for path in (tmp_path / "earlier").iterdir()}
    assert earlier == {
        "20270115T080000Z-rank-1.error.json": "rank-1.error.json",
        "20270115T080000Z-flight-recorder-1": "flight-recorder-1",
    }


def test_a_users_own_settings_of_the_flight_recorder_stay(tmp_path: Path):
    new = failure_files.flight_recorder_variables(tmp_path, {})
    assert new == {
        "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/flight-recorder-",
        "TORCH_FR_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_BUFFER_SIZE": "2000",
    }
    given = {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0", "TORCH_FR_DUMP_TEMP_FILE": "/mine-"}
    assert failure_files.flight_recorder_variables(tmp_path, given) == {"TORCH_FR_DUMP_ON_TIMEOUT": "1"}


def test_torch_heeds_these_names(tmp_path: Path):
    program = (
        "from torch._C._distributed_c10d import _dump_fr_trace_file; _dump_fr_trace_file(5, includeStackTraces=False)"
    )
    variables = failure_files.flight_recorder_variables(tmp_path, {})
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in failure_files.flight_recorder_files(tmp_path)] == ["flight-recorder-5"]
    assert "deprecated" not in done.stderr
