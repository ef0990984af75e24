"""The question that training asks the plan: what cannot fit is refused, with a way out that fits; nothing else is."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kilobatch.data.errors import UserError
from kilobatch.data.views.groups import pixels_of_views
from kilobatch.launch.planning import fake_step
from kilobatch.launch.planning.answer import Answer, Request, answers, gpu_memory
from kilobatch.launch.planning.fake_step import StepLayout
from kilobatch.launch.planning.fake_tensors import fake_ranks
from kilobatch.launch.planning.machines import GIB
from kilobatch.launch.planning.question import SMALL_STEP, Question, is_small
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.recipes import catalogue
from kilobatch.launch.recipes.data import prepare_data
from kilobatch.launch.recipes.recipe import Recipe, resolve_recipe
from kilobatch.launch.recipes.references import references
from kilobatch.methods.networks import vit

TINY = ["data.batch=64", "data.views.size=32", "encoder.name=convnet", "encoder.width=8"]
CPU = torch.device("cpu")


def asked(recipe: Recipe, gib: float, gpu: float | None = None, **known: int | bool) -> list[Answer]:
    request = Request(**{"workers": 1, "nodes": 1, "has": int(gib * GIB), "other_nodes": False, **known})  # pyright: ignore[reportArgumentType]
    return list(answers(recipe, request, 100, 10, None if gpu is None else int(gpu * GIB)))


def needs(recipe: Recipe) -> float:
    return asked(recipe, 1000)[0].needs / GIB


def test_only_what_exceeds_the_memory_by_more_than_a_plan_can_err_is_refused() -> None:
    """Batches that wait are left out: a slow loader never has them."""
    recipe = resolve_recipe("demo", TINY)
    whole, waiting = needs(recipe), 3 * 4 * 64 * 2 * 3 * 32**2 / GIB
    (fits,) = asked(recipe, (whole - waiting) / 1.09)
    assert fits.fits and fits.way_out is None and fits.needs == pytest.approx(whole * GIB)
    first, second = asked(recipe, (whole - waiting) / 1.11)
    assert not first.fits and first.way_out is None and not second.fits
    assert second.way_out and "use data.batch=" in second.way_out


@pytest.mark.parametrize(
    "changes", [["encoder.norm=local", "engine.keep=0"], ["encoder.norm=local", "engine.keep=1"], []]
)
def test_the_way_out_fits_where_it_is_taken(changes: list[str]) -> None:
    recipe = resolve_recipe("demo", [*TINY, *changes])
    has = needs(recipe) / 2.5
    *_, last = asked(recipe, has)
    match = re.search(r"use ((\S+=\S+)( \S+=\S+)*) \(", last.way_out or "")
    assert match, last
    (after,) = asked(resolve_recipe("demo", [*TINY, *changes, *match[1].split()]), has)
    assert after.fits and after.needs < has * GIB


def test_where_chunks_are_chosen_in_the_run_the_least_counts() -> None:
    recipe = resolve_recipe("demo", [*TINY, "encoder.norm=local", "engine.chunks=auto"])
    whole = needs(recipe)
    (fits,) = asked(recipe, whole / 2)
    assert fits.fits and "chunks" in fits.step and fits.needs < whole / 2 * GIB
    assert not asked(recipe, whole / 100)[0].fits


def test_a_way_out_is_one_of_the_command() -> None:
    """More nodes are named for jobs alone."""
    recipe = resolve_recipe("demo", TINY)
    here, job = (asked(recipe, 1e-4, other_nodes=other)[-1].way_out for other in (False, True))
    assert here and "nodes" not in here and job and "64 times the nodes" in job


def test_a_run_that_goes_on_keeps_its_batch() -> None:
    recipe = resolve_recipe("demo", TINY)
    has = needs(recipe) / 4
    new, resumed, job = (
        asked(recipe, has, goes_on=goes_on, other_nodes=nodes)[-1].way_out
        for goes_on, nodes in ((False, False), (True, False), (True, True))
    )
    assert new and "use data.batch=" in new
    assert resumed and "data.batch" not in resumed and "or a smaller" not in resumed
    assert job and "data.batch" not in job


def test_after_a_kill_there_is_a_way_out_also_of_what_should_have_fitted() -> None:
    recipe = resolve_recipe("demo", [*TINY, "encoder.norm=local"])
    first, second = asked(recipe, 100, killed=True)
    assert first.fits and second.way_out and "use engine.chunks=" in second.way_out


def test_on_a_gpu_its_own_memory_counts_without_what_is_assumed() -> None:
    """2 GiB for CUDA and the share of fragments are printed by a plan, but refuse nothing."""
    recipe = resolve_recipe("demo", TINY)
    found = asked(recipe, 0, gpu=79.6)[0]
    assert found.fits and found.gpu and found.needs / GIB < needs(recipe)  # waiting batches are uint8
    assert asked(recipe, 0, gpu=found.needs / GIB)[0].fits
    refused = asked(recipe, 100, gpu=found.needs / GIB / 1.5)[0]
    assert not refused.fits and "and a GPU of this machine has" in refused.describe(1)


def test_the_memory_of_gpus_is_that_of_the_largest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_memory() is None
    program = tmp_path / "nvidia-smi"
    for text, size in (("40960\n81559", 81_559 * 2**20), ("[Not Supported]", None), ("", None)):
        program.write_text(f"#!/bin/sh\necho '{text}'\n")
        program.chmod(0o755)
        assert gpu_memory() == size
    program.write_text("#!/bin/sh\necho 81559; exit 9\n")
    assert gpu_memory() is None


def test_numbers_of_several_workers() -> None:
    found = Answer(needs=9 * GIB, has=4 * GIB, fits=False, gpu=False, step="64 images a rank need 9.0 GiB")
    assert found.describe(1).endswith("need 9.0 GiB, and this machine has 4.0 GiB free")
    assert found.describe(2).endswith("and this machine has 8.0 GiB free, 4.0 GiB for each of 2 workers")


def test_fake_positions_are_not_kept() -> None:
    """Several layouts of a transformer are planned in one process, which may also compute with it."""
    recipe = resolve_recipe("moco_v3_vit_small_imagenet", ["data.batch=4", "data.views.size=32"])
    for samples in (4, 2):
        assert fake_step.run_fake_step(recipe, StepLayout(1, samples, 1), 100, 10).forward
    with fake_ranks(1):
        vit.positions(3, 8, CPU)
    assert type(vit.positions(3, 8, CPU)) is torch.Tensor


# What a process answers, by the class that asks it.


def question(tmp_path: Path, *changes: str, anyway: bool = False, workers: int = 1) -> Question:
    recipe = resolve_recipe("demo", [*TINY, "data.train=digits", "encoder.width=24", *changes])
    (tmp_path / "recipe.yaml").write_text(recipe.dump_yaml())
    found = Question(tmp_path, recipe, workers, anyway=anyway)
    found.ask(prepare_data(recipe))
    return found


def ended(found: Question) -> bool:
    until = time.monotonic() + 100
    while found._read() and not found.cannot_fit():
        assert time.monotonic() < until
        time.sleep(0.05)
    return found.cannot_fit()


def test_the_answer_of_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kilobatch.launch.planning.question.machine_memory.most_per_worker", lambda workers: GIB // 20)
    found = question(tmp_path)
    assert ended(found)
    while (message := found.refusal()) is None:
        time.sleep(0.05)
    assert found.refused and re.fullmatch(
        r"kilobatch: this run cannot fit into memory: 64 images a rank need [\d.]+ MiB \(.+\) at their most, in the "
        r"backward, and this machine has 51.2 MiB free; .*use data.batch=\d+ \([\d.]+ MiB\), or --anyway if you "
        r"mean it",
        message,
    )
    found.close()


def test_a_fit_is_no_refusal_and_an_end_for_want_of_memory_gets_the_plans_number(tmp_path: Path) -> None:
    found = question(tmp_path)
    assert not ended(found) and not found.refused
    killed = RunOutcome("failed", 0, "here", "killed by the kernel for want of memory", short_of_memory=True)
    told = found.explain(killed).how
    assert re.fullmatch(rf"{killed.how}; kilobatch plan says [\d.]+ MiB a worker; .*use data.batch=\d+ \(.+\)", told)
    other = replace(killed, short_of_memory=False)
    assert found.explain(other) is other


@pytest.mark.parametrize("before", [0, 3])
def test_a_worker_that_is_quicker_than_the_answer_no(
    tmp_path: Path, before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a refusal, too, unless the run has trained steps before."""
    monkeypatch.setattr("kilobatch.launch.planning.question.machine_memory.most_per_worker", lambda workers: GIB // 20)
    found = question(tmp_path)
    if before:
        (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')
    told = found.explain(RunOutcome("failed", 1, "here", "out of memory; it held 51.0 MiB", short_of_memory=True))
    assert (told.kind, found.refused) == (("failed", False) if before else ("refused", True))
    if not before:
        assert "51.2 MiB free (rank 1: out of memory; it held 51.0 MiB); " in told.lines[0]


def test_an_error_of_the_plan_is_told_and_refuses_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = resolve_recipe("demo", [*TINY, "data.train=digits", "encoder.width=24"])
    found = Question(tmp_path / "nowhere", recipe, 1, anyway=False)
    found.ask(prepare_data(recipe))
    assert not ended(found)
    assert "by an error of the plan: " in (said := capfd.readouterr().err) and "nowhere" in said


@pytest.mark.parametrize("why", ["--anyway", "engine.compile=true", "small", "trained"])
def test_what_is_not_asked(tmp_path: Path, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "trained":  # such workers only evaluate
        monkeypatch.setattr("kilobatch.launch.planning.question.training_finished", lambda folder, epochs: True)
    changes = {"engine.compile=true": [why], "small": ["encoder.width=8"]}.get(why, [])
    assert question(tmp_path, *changes, anyway=why == "--anyway")._process is None


@pytest.mark.parametrize("name", ["demo", "simclr_v2_digits"])
def test_a_small_step_stays_below_its_bound(name: str) -> None:
    """Also where digits are shown larger, and in the largest batch."""
    for changes in ([], ["data.batch=1434", "data.views.size=64"]):
        recipe = resolve_recipe(name, changes)
        views = 4 * recipe.data.batch * 3 * pixels_of_views(recipe.data.groups)
        bound = SMALL_STEP[0] + SMALL_STEP[1] * views
        request = Request(workers=1, nodes=1, has=bound, other_nodes=False)
        assert is_small(recipe, request) and not is_small(recipe, request.model_copy(update={"has": bound - 1}))
        assert needs(recipe) * GIB < bound


def test_a_network_that_is_taken_from_elsewhere_may_be_large() -> None:
    names = [name for name in catalogue.recipe_names() if name.startswith("simclr_v2_digits_")]
    request = Request(workers=1, nodes=1, has=1000 * GIB, other_nodes=False)
    taking = [recipe for name in names if references(recipe := resolve_recipe(name, []))]
    assert taking and not any(is_small(recipe, request) for recipe in taking)


@pytest.mark.slow
@pytest.mark.parametrize("name", catalogue.recipe_names())
def test_no_shipped_recipe_that_fits_is_refused(name: str) -> None:
    """With as much memory as its plan says. Nothing is answered of a recipe that takes from a run which is not here."""
    recipe = resolve_recipe(name, [])
    if references(recipe) or getattr(recipe.method, "shuffle", False):  # nor of one that a single worker cannot train
        with pytest.raises(UserError):
            asked(recipe, 1)
        return
    assert asked(recipe, needs(recipe))[0].fits
