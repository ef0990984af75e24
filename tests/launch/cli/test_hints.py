"""The end of a run that ends early: one hint how to go on, the right one. Also train's --name and --dry-run."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kilobatch.launch.jobs.attempt import _Attempt
from kilobatch.launch.jobs.signals import Signals
from kilobatch.launch.pipelines.pipeline import resume_hint
from kilobatch.launch.processes import launcher
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.recipes.recipe import load_recipe, resolve_recipe
from kilobatch.launch.runs import job_history, run_folder
from kilobatch.launch.runs.job_history import JobFile
from kilobatch.launch.schedulers.local import Local
from kilobatch.launch.schedulers.scheduler import Task
from tests.launch.conftest import CommandResult

WAY_BACK = ["the loss of step 3 is nan; go on from it with: kilobatch resume runs/a --from 1"]
STOPPED = RunOutcome("interrupted")
FAILED = RunOutcome("failed", 1, "here", "ended by SIGKILL", ["its last words"])
DIVERGED = RunOutcome("failed", 1, "here", "exit code 1", WAY_BACK)
REFUSED = RunOutcome("refused", 0, "here", lines=["kilobatch: no whole checkpoint"])
LOG = "kilobatch: rank 1 failed first: {how}; log: {run}/logs/rank-1.log; its last lines:\n    {line}\n"
FAILURE = LOG.format(how="ended by SIGKILL", run="runs/a", line="its last words")
DIVERGENCE = LOG.format(how="exit code 1", run="runs/a", line=WAY_BACK[0])

TRAIN = {
    "stopped": (STOPPED, 130, "kilobatch: stopped; go on with: kilobatch resume runs/a\n"),
    "failed": (FAILED, 1, FAILURE + "kilobatch: failed; go on with: kilobatch resume runs/a\n"),
    "diverged": (DIVERGED, 1, DIVERGENCE),
    "refused": (REFUSED, 2, ""),
    "finished": (RunOutcome("finished"), 0, ""),
}
TINY = ["evaluate.final=[]", "data.test=null"]


@pytest.fixture
def ends_with(kilobatch: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch) -> Callable[..., CommandResult]:
    """Runs a command whose workers end so."""

    def run(outcome: RunOutcome, *words: str) -> CommandResult:
        monkeypatch.setattr(launcher, "run_workers", lambda *arguments, **more: outcome)
        return kilobatch(*words)

    return run


def after_conversion(err: str) -> str:
    """What was printed on stderr after the progress of conversions."""
    progress = ("\r", "convert")
    return "".join(line for line in err.splitlines(keepends=True) if not line.startswith(progress))


@pytest.mark.parametrize("end", TRAIN)
def test_of_train_and_resume(end: str, ends_with: Callable[..., CommandResult]) -> None:
    outcome, code, told = TRAIN[end]
    first = ends_with(outcome, "train", "demo", *TINY, "--name", "a", "--workers", "2")
    trained = "trained: runs/a; kilobatch embed runs/a IMAGES features.npz writes its features of images\n"
    assert (first.code, first.out) == (code, f"run: runs/a\nstarting 2 workers\n{trained if code == 0 else ''}")
    assert after_conversion(first.err) == told
    if code != 0:
        again = ends_with(outcome, "resume", "a")
        assert (again.code, after_conversion(again.err)) == (code, told)


PIPELINE = {
    "stopped": (STOPPED, 130, "kilobatch: stopped in pretrain; go on with: kilobatch resume runs/p\n"),
    "failed": (
        FAILED,
        1,
        FAILURE.replace("runs/a", "runs/p/pretrain")
        + "kilobatch: failed in pretrain; go on with: kilobatch resume runs/p\n",
    ),
    "diverged": (
        DIVERGED,
        1,
        LOG.format(how="exit code 1", run="runs/p/pretrain", line=WAY_BACK[0]) + "kilobatch: failed in pretrain\n",
    ),
    "refused": (REFUSED, 2, "kilobatch: refused in pretrain; go on with: kilobatch resume runs/p\n"),
}


@pytest.mark.parametrize("end", PIPELINE)
def test_of_a_pipeline_and_its_stages(end: str, ends_with: Callable[..., CommandResult]) -> None:
    """A stage that was resumed alone names itself."""
    outcome, code, told = PIPELINE[end]
    first = ends_with(outcome, "pipeline", "simclr_v2_digits", "--name", "p", "--workers", "2")
    assert (first.code, first.out) == (code, "pipeline: runs/p\nstarting 2 workers\n")
    assert after_conversion(first.err) == "pretrain: runs/p/pretrain\n" + told
    again = ends_with(outcome, "resume", "p")
    assert again.err.endswith(told) and again.err.count("kilobatch resume") == told.count("kilobatch resume")
    if end == "stopped":
        alone = ends_with(outcome, "resume", "p/pretrain").err
        assert alone == "kilobatch: stopped; go on with: kilobatch resume runs/p/pretrain\n"


@pytest.mark.parametrize("outcome", [FAILED, DIVERGED])
def test_of_a_job(
    outcome: RunOutcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = resolve_recipe("demo", ["run.requeue.crashes=0"])
    run = run_folder.create_run(recipe.run.model_copy(update={"name": "a"}), "demo", recipe.dump_yaml(), 2)
    job_history.write_job_file(
        run, JobFile(cluster="local", job_id="5", workers_per_node=2, submitted=job_history.utc_now(), code="code/001")
    )
    task = Task(job="5", restart=0, node=0, nodes=1, hosts=["here"])
    job_history.record_start(run, "5", 0, ["here"], 2)
    handled = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)}
    attempt = _Attempt(run, task, Local(), Signals(), number=1)
    for number, handler in handled.items():
        signal.signal(number, handler)
    attempt._finish(outcome, recipe, 2)
    told = capsys.readouterr().err
    assert told.count("kilobatch resume") == 1
    assert ("go on with: kilobatch resume runs/a\n" in told) == (outcome is FAILED)


def test_of_a_stage_that_is_a_job(ends_with: Callable[..., CommandResult]) -> None:
    ends_with(STOPPED, "pipeline", "simclr_v2_digits", "--name", "p", "--workers", "2")
    assert resume_hint(Path("runs/p/finetune")) == "; go on with: kilobatch resume runs/p"
    assert resume_hint(Path("runs/other")) == "; go on with: kilobatch resume runs/other"


def test_a_name_that_is_taken_or_a_path_is_refused_as_by_submit(ends_with: Callable[..., CommandResult]) -> None:
    ends_with(STOPPED, "train", "demo", *TINY, "--name", "a", "--workers", "2")
    for name, part in (("a", "runs/a is not empty; choose another name"), ("../a", "run.folder")):
        told = [
            ends_with(STOPPED, command, "demo", *TINY, "--name", name, *more).err
            for command, more in (("train", ["--workers", "2"]), ("submit", ["--cluster", "local"]))
        ]
        assert part in told[0] and told[0] == told[1]


def test_a_dry_run_checks_and_prints_the_recipe_and_makes_nothing(
    kilobatch: Callable[..., CommandResult], tmp_path: Path
) -> None:
    result = kilobatch("train", "demo", "data.batch=480", "--name", "a", "--workers", "2", "--dry-run")
    assert result.code == 0 and result.err == "kilobatch: nothing was created; it would train in runs/a\n"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "printed.yaml").write_text(result.out)
    assert load_recipe(tmp_path / "printed.yaml")[0].data.batch == 480
    assert kilobatch("train", "demo", "data.batch=481", "--workers", "2", "--dry-run").code == 2


def test_a_dry_run_of_a_pipeline(kilobatch: Callable[..., CommandResult], tmp_path: Path) -> None:
    result = kilobatch("pipeline", "simclr_v2_digits", "--name", "p", "--workers", "2", "--dry-run")
    assert (result.code, result.err) == (0, "kilobatch: nothing was created; it would train in runs/p\n")
    assert [line for line in result.out.splitlines() if line.startswith("#")] == [
        f"# {stage}: runs/p/{stage}" for stage in ("pretrain", "finetune", "distill")
    ]
    assert list(tmp_path.iterdir()) == []
