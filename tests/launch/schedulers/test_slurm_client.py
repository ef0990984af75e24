"""The output of SLURM's commands, as the client reads it. The commands themselves: tests/slurm/."""

from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.launch.schedulers import slurm
from kilobatch.launch.schedulers.scheduler import JobState, NoAnswer
from kilobatch.launch.schedulers.slurm import Slurm


@pytest.mark.parametrize(
    ("left", "seconds"),
    [("9:56", 596), ("1:00:03", 3603), ("2-01:00:00", 176400), ("0:00", 0), ("UNLIMITED", None), ("INVALID", None)],
)
def test_time_left(left: str, seconds: float | None):
    assert slurm._seconds(left) == seconds


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for programs that stand in for SLURM's, as where the controller or the database is in trouble."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def program(folder: Path, name: str, lines: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{lines}\n")
    (folder / name).chmod(0o755)


def test_jobs_that_squeue_does_not_list_are_looked_up_by_sacct(commands: Path):
    program(commands, "squeue", "echo '3|RUNNING|n[0-2]|1:00|None'; echo '4_1|PENDING||2:00|Priority, or (Resources)'")
    program(commands, "sacct", "echo '5|CANCELLED by 1000'; echo '6|COMPLETED'; echo '7|RUNNING'")
    assert Slurm().states(["3", "4_1", "5", "6", "7", "", "8"]) == {
        "3": JobState("running", "RUNNING", nodes="n[0-2]", seconds_left=60),
        "4_1": JobState("queued", "PENDING", why="Priority, or (Resources)", seconds_left=120),
        "5": JobState("cancelled", "CANCELLED by 1000"),
        "6": JobState("finished", "COMPLETED"),
        "7": JobState("gone"),
        "": JobState("gone"),
        "8": JobState("gone"),
    }


@pytest.mark.parametrize("trouble", ["echo 'Slurm accounting storage is disabled' >&2; exit 1", "sleep 30"])
def test_without_accounting_they_are_gone(commands: Path, trouble: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm, "ANSWER_TIMEOUT", 0.5)
    program(commands, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    program(commands, "sacct", f"exec {trouble}" if trouble.startswith("sleep") else trouble)
    assert Slurm().states(["5"]) == {"5": JobState("gone")}


def test_no_jobs_no_call(commands: Path):
    assert Slurm().states([]) == {}
    Slurm().cancel([])


def test_a_controller_that_does_not_answer(commands: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm, "ANSWER_TIMEOUT", 0.2)
    program(commands, "squeue", "exec sleep 30")
    with pytest.raises(UserError, match="SLURM does not answer: squeue"):
        Slurm().states(["5"])
    (commands / "squeue").unlink()
    monkeypatch.setenv("PATH", str(commands))
    with pytest.raises(UserError, match="there is no squeue here"):
        Slurm().states(["5"])


@pytest.fixture
def controller(commands: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SLURM's commands of a controller that does the work and then answers as the file `answers` says, a word for each
    call: late, lost, killed, wrong, refused, or else at once. Job 5 runs, and stands in the file `job`."""
    monkeypatch.setattr(slurm, "RETRY_PAUSE", 0.05)
    monkeypatch.setattr(slurm, "CHANGE_TIMEOUT", 0.5)
    monkeypatch.setattr(slurm, "RETRY_FOR", 1.5)
    monkeypatch.setattr(slurm, "COMMAND_RETRY_FOR", 1.5)
    (commands / "job").write_text("RUNNING 0")
    answer = f"""
    cd {commands}; echo "${{0##*/}} $*" >> calls
    answer=$(head -n1 answers); sed -i 1d answers
    case $answer in
        late) sleep 0.2;;
        lost) exec sleep 30;;
        killed) kill -9 $$;;
        wrong) echo 'Segmentation fault' >&2; exit 139;;
        *refused) echo 'error: Requested operation is presently disabled for job 5' >&2; exit 1;;
        *unreachable) echo 'error: Unable to contact slurm controller (connect failure)' >&2; exit 1;;
        garbled) echo '???'; exit 0;;
    esac
    """
    work = {
        "scontrol requeue": 'read state restarts < job; [ $state = RUNNING ] && echo "PENDING $((restarts + 1))" > job',
        "scancel": 'case $1 in --signal=*) echo $1 >> signals;; *) echo "CANCELLED 0" > job;; esac',
        "sbatch": 'echo "7|$1" >> queue; say="Submitted batch job 7"',
    }
    for name in ("scancel", "sbatch"):
        program(commands, name, f"cd {commands}; grep -q untouched answers || {{ {work[name]}; }}{answer}echo $say")
    show = f"cd {commands}; read state restarts < job; echo JobId=5 JobState=$state Restarts=$restarts; exit"
    program(commands, "scontrol", f"[ $1 = -o ] && {{ {show}; }}\ncd {commands}; {work['scontrol requeue']}{answer}")
    program(
        commands,
        "squeue",
        f'cd {commands}; case "$*" in *%F*) cat queue; exit;; esac\n'
        'read state restarts < job; echo "5|$state|n0|1:00|None"',
    )
    for name in ("answers", "calls", "signals", "queue"):
        (commands / name).touch()
    return commands


def calls(controller: Path) -> list[str]:
    return (controller / "calls").read_text().splitlines()


@pytest.mark.parametrize("answer", ["", "late", "lost", "killed", "wrong", "refused", "unreachable"])
def test_a_requeue_that_worked_is_a_requeue_whatever_the_answer(controller: Path, answer: str):
    (controller / "answers").write_text(answer)
    Slurm().requeue("5", 0)
    assert (controller / "job").read_text() == "PENDING 1\n"
    assert calls(controller) == ["scontrol requeue 5"], "it is not asked for twice"


def test_a_requeue_that_did_not_work_is_repeated_until_there_is_an_answer(controller: Path):
    (controller / "job").write_text("COMPLETING 0")  # no request changes anything
    (controller / "answers").write_text("lost\nunreachable\nrefused\n")
    with pytest.raises(UserError, match="scontrol requeue: .*presently disabled for job 5") as refusal:
        Slurm().requeue("5", 0)
    assert not isinstance(refusal.value, NoAnswer) and len(calls(controller)) == 3
    (controller / "answers").write_text("unreachable\n" * 100)
    with pytest.raises(NoAnswer, match="Unable to contact"):
        Slurm().requeue("5", 0)


def test_a_refusal_whose_reason_cannot_be_seen_is_no_answer(controller: Path):
    (controller / "answers").write_text("lost\n" + "refused\n" * 100)
    program(controller, "scontrol", (controller / "scontrol").read_text().replace("echo JobId=5", "exit 1; echo"))
    with pytest.raises(NoAnswer, match="presently disabled"):
        Slurm().requeue("5", 0)


@pytest.mark.parametrize("answer", ["", "late", "lost", "killed", "wrong", "refused", "unreachable"])
def test_a_job_that_is_cancelled_is_cancelled_whatever_the_answer(controller: Path, answer: str):
    (controller / "answers").write_text(answer)
    Slurm().cancel(["5", ""])
    assert calls(controller) == ["scancel 5"]


def test_a_signal_whose_answer_is_missing_is_sent_again(controller: Path):
    (controller / "answers").write_text("lost\nunreachable\n")
    Slurm().signal("5", "USR2")
    assert len((controller / "signals").read_text().splitlines()) == 3
    (controller / "job").write_text("COMPLETED 0")
    (controller / "answers").write_text("refused\n")
    with pytest.raises(UserError, match="presently disabled"):
        Slurm().signal("5", "USR2")
    (controller / "answers").write_text("lost\nrefused\n")
    Slurm().signal("5", "USR2")  # the first has ended it


@pytest.mark.parametrize("answer", ["", "late", "lost", "killed", "wrong", "unreachable", "garbled"])
def test_a_job_whose_submission_has_no_answer_is_found_by_its_script(controller: Path, answer: str, tmp_path: Path):
    (controller / "answers").write_text(answer)
    (controller / "queue").write_text(f"6|{tmp_path}/other.sh\n")
    assert Slurm().submit(tmp_path / "one.sh") == "7"
    assert calls(controller) == [f"sbatch {tmp_path}/one.sh"], "it is not sent twice"


def test_a_job_that_was_not_submitted_is_sent_again_or_refused(controller: Path, tmp_path: Path):
    (controller / "answers").write_text("untouched unreachable\n")
    assert Slurm().submit(tmp_path / "one.sh") == "7"
    assert len(calls(controller)) == 2
    (controller / "answers").write_text("untouched refused\n")
    with pytest.raises(UserError, match="sbatch: .*presently disabled"):
        Slurm().submit(tmp_path / "two.sh")


@pytest.mark.parametrize("text", ["", "JobId=5", "Restarts=x JobState=RUNNING"])
def test_an_answer_that_says_nothing_is_refused(commands: Path, text: str):
    program(commands, "scontrol", f"echo '{text}'")
    program(commands, "squeue", "echo 'slurm: error in plugin'")
    with pytest.raises(UserError, match="without Restarts and JobState"):
        Slurm().fate("5", 0, None)
    with pytest.raises(UserError, match="squeue answers 'slurm: error in plugin'"):
        Slurm().states(["5"])
