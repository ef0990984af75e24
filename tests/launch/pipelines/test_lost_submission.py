"""A pipeline's submission of which SLURM answers a part: what is queued stays, and nothing is sent twice."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.pipelines.pipeline import STAGES
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.schedulers import slurm
from tests.launch.conftest import CommandResult

SUBMITTED = ["pipeline", "simclr_v2_digits", "--time", "1:00:00", "--name", "mine"]
# It takes each job, numbers it from 7 on, and writes down its script and the job that it waits for; it does not answer
# where the number is in the file `mute`, and squeue not where there is a file `down`.
SBATCH = """#!/bin/sh
case $1 in /*) ;; *) exit ;; esac
number=$((7 + $(cat $HOME/queue | wc -l)))
if grep -q "^$number$" $HOME/refused; then echo "sbatch: error: Invalid account" >&2; exit 1; fi
echo "$number|$1" >> $HOME/queue
grep -o "afterok:.*" "$1" >> $HOME/waits
if grep -q "^$number$" $HOME/mute; then touch $HOME/down; echo "sbatch: error: Socket timed out" >&2; exit 1; fi
echo "Submitted batch job $number"
"""
SQUEUE = """#!/bin/sh
test -e $HOME/down && echo "squeue: error: Unable to contact slurm controller" >&2 && exit 1
case "$*" in *%o*) cat $HOME/queue;; *) sed 's/|.*/|PENDING||1:00|Dependency/' $HOME/queue;; esac
"""


@pytest.fixture
def scheduler(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder, with the files that the two commands look at."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(folder))
    cancelled = "#!/bin/sh\necho $* >> $HOME/cancelled\n> $HOME/queue\n"
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("scancel", cancelled)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name in ("queue", "waits", "mute", "refused"):
        (folder / name).touch()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "RETRY_PAUSE", 0.05)
    monkeypatch.setattr(slurm, "COMMAND_RETRY_FOR", 0.1)
    return folder


def jobs() -> list[str | None]:
    files = [job_history.read_job_file(Path("runs/mine") / stage) for stage in STAGES]
    return [file.job_id if file else None for file in files]


def test_a_stage_of_which_nothing_is_known(kilobatch: Callable[..., CommandResult], scheduler: Path):
    (scheduler / "mute").write_text("8\n")
    result = kilobatch(*SUBMITTED)
    assert result.code == 2 and "Traceback" not in result.err
    assert "kilobatch: it is not known" in result.err, result.err
    message = result.err[result.err.index("kilobatch: it is not known") :]
    assert message.startswith("kilobatch: it is not known whether the job of runs/mine/finetune is queued: sbatch: Soc")
    assert "pretrain is job 7; distill was not submitted; once SLURM answers, kilobatch resume runs/mine" in message
    assert jobs() == ["7", "", None]
    assert [run_folder.read_state(Path("runs/mine") / stage).status for stage in STAGES] == ["queued", "queued", "new"]

    result = kilobatch("resume", "mine")  # SLURM does not answer yet
    assert result.code == 2 and "Unable to contact" in result.err and jobs() == ["7", "", None]
    (scheduler / "down").unlink()
    result = kilobatch("resume", "mine")
    assert (result.code, result.err) == (0, ""), result.err
    assert jobs() == ["7", "8", "9"]
    assert (scheduler / "waits").read_text().split() == ["afterok:7", "afterok:8"]
    assert not (scheduler / "cancelled").exists()
    assert "is queued as job 7; kilobatch cancel runs/mine ends it" in kilobatch("resume", "mine").err


def test_a_stage_that_was_not_queued_after_all(kilobatch: Callable[..., CommandResult], scheduler: Path):
    (scheduler / "mute").write_text("8\n")
    assert kilobatch(*SUBMITTED).code == 2
    (scheduler / "down").unlink()
    (scheduler / "mute").write_text("")
    (scheduler / "queue").write_text((scheduler / "queue").read_text().splitlines(keepends=True)[0])
    assert kilobatch("resume", "mine").code == 0
    assert jobs() == ["7", "8", "9"]
    assert (scheduler / "waits").read_text().split() == ["afterok:7", "afterok:7", "afterok:8"]


def test_a_refusal_removes_all_that_was_made(kilobatch: Callable[..., CommandResult], scheduler: Path):
    (scheduler / "refused").write_text("8\n")
    result = kilobatch(*SUBMITTED)
    assert result.code == 2 and "sbatch refused the job: Invalid account" in result.err
    assert (scheduler / "cancelled").read_text() == "7\n" and not Path("runs/mine").exists()


def test_a_resume_that_is_refused_leaves_all_as_it_was(kilobatch: Callable[..., CommandResult], scheduler: Path):
    assert kilobatch(*SUBMITTED).code == 0
    (scheduler / "queue").write_text("1\n2\n3\n")  # those jobs have ended
    (scheduler / "squeue").write_text("#!/bin/sh\n")
    (scheduler / "refused").write_text("11\n")  # of the second stage
    recipe = Path("runs/mine/distill/recipe.yaml")
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 1"))
    before = records()
    result = kilobatch("resume", "mine")
    assert result.code == 2 and "sbatch refused the job: Invalid account" in result.err
    assert records() == before and not Path("runs/mine/code/002").exists()
    (scheduler / "refused").write_text("")
    (scheduler / "queue").write_text("1\n2\n3\n")
    assert kilobatch("resume", "mine").code == 0 and jobs() == ["10", "11", "12"]


def records() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("runs/mine").glob("*/*") if path.suffix in (".json", ".yaml")}
