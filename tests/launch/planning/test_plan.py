"""The plan against real steps, arithmetic and its refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.plan_check import CASES, both
from kilobatch.launch.planning.fake_step import Layout, Step, step
from kilobatch.launch.planning.fit import Fitting, ways_out
from kilobatch.launch.planning.machines import GIB, HOPS, machine
from kilobatch.launch.planning.memory import memory
from kilobatch.launch.planning.step_time import time
from kilobatch.launch.recipes import recipe
from kilobatch.trainer.costs import collective_time as traffic
from kilobatch.trainer.costs.collective_time import Link
from tests.launch.conftest import Said

TINY = ["data.batch=64", "data.views.size=32", "encoder.name=convnet", "encoder.width=8"]


@pytest.mark.parametrize(("case", "ranks"), [("the demo in 4 chunks, 2 kept", 1), ("the demo, 256 images", 2)])
def test_memory_is_within_a_tenth_of_what_real_steps_take(case: str, ranks: int) -> None:
    predicted, measured = both(*CASES[case], ranks)
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("the demo")])
def test_memory_of_larger_networks(case: str) -> None:
    predicted, measured = both(*CASES[case], 2 if "ZeRO" in case else 1)
    assert predicted == pytest.approx(measured, rel=0.1)


def looked_at(name: str, ranks: int, samples: int, chunks: int = 1, changes: list[str] | None = None) -> Step:
    return step(recipe.resolve(name, [*TINY, *(changes or [])]), Layout(ranks, samples, chunks), 100, 10)


def test_what_is_sent_is_what_the_method_sends() -> None:
    """SimCLR with global norms: two numbers a channel each way, the embeddings and one sum for each row."""
    found = looked_at("demo", 4, 16)
    widths = [8, 16, 16, 32, 32, 64, 64, 64 * 2]  # convolutions; the head's hidden layer, then its 128 numbers
    forward, backward = 8 * (2 * sum(widths) + len(widths)), 4 * 2 * sum(widths)
    assert found.sent.calls["BatchNorm", "all_gather"] == 2 * len(widths)
    assert found.sent.whole["BatchNorm", "all_gather"] == 4 * (forward + backward)
    many = looked_at("demo", 16, 4)  # they reduce
    assert many.sent.calls["BatchNorm", "all_reduce"] == 2 * len(widths)
    assert many.sent.whole["BatchNorm", "all_reduce"] == forward + backward
    assert found.sent.whole["loss", "all_gather"] == 4 * (4 * 32) * (128 + 1)
    alone = looked_at("demo", 1, 64)
    assert not alone.sent.calls


@pytest.mark.parametrize("name", ["mochi_cifar10", "moco_v3_cifar10", "pirl_cifar10"])
def test_methods_whose_shapes_data_decide(name: str) -> None:
    """Queues, banks and masks; a queue's share is held exactly."""
    size = ["data.views.size=48"] if name.startswith("pirl") else []
    queue = ["method.queue.length=1000", "method.queue.placement=sharded", "method.hard=16"]
    found = looked_at(name, 3, 16, 1, [*size, *(queue if "mochi" in name else [])])
    assert found.forward and found.backward and found.sent.calls
    if "mochi" in name:
        assert found.held["queue or bank"] == 334 * 128 * 4 + 8  # 1000 keys over 3 ranks, and their counter
        assert found.target > 0


def test_chunks_and_zero() -> None:
    """More chunks take less for activations, more kept graphs more; ZeRO shares the optimizer's state."""
    chosen = recipe.resolve("demo", [*TINY, "encoder.norm=local"])
    cpu, views = machine("cpu"), chosen.data.views
    found = {c: step(chosen, Layout(2, 32, c), 100, 10) for c in (2, 4)}

    def held(chunks: int, keep: int, zero: int = 0) -> dict[str, int]:
        return dict(memory(found[chunks], Layout(2, 32, chunks), keep, zero, views, cpu).parts)

    assert held(4, 1)["activations"] == pytest.approx(held(2, 1)["activations"] / 2, rel=0.1)
    assert held(4, 3)["activations"] - held(4, 2)["activations"] == found[4].kept
    assert held(4, 1, 1)["optimizer"] == pytest.approx(held(4, 1, 0)["optimizer"] / 2, rel=0.01)
    once, twice = (found[4].flops(Layout(2, 32, 4), keep) for keep in (4, 0))
    assert twice - once == 4 * found[4].forward


def test_time_is_operations_bytes_and_views() -> None:
    chosen = recipe.resolve("demo", TINY)
    layout = Layout(4, 16, 1)
    found = step(chosen, layout, 100, 10)
    gpu = machine("a100")
    took = time(chosen, found, layout, 1, 2, gpu, None, 8)
    assert took.flops == found.forward + found.backward + found.loss
    assert took.compute == pytest.approx(took.flops / (11.2 * 2.039e12))
    gradients = next(one for one in took.collectives if one.purpose == "gradients")
    assert gradients.sent == round(2 * 3 / 4 * 4 * found.trained)
    link = Link("", 2, 0.8 * 300e9, HOPS[0], 0.8 * 25e9, HOPS[1])
    assert gradients.seconds == pytest.approx(traffic.seconds("all_reduce", 4 * found.trained, 4, link))
    assert took.loader == pytest.approx(32 * 2 / 4352 / 8)
    assert took.binds == "loader"
    assert time(chosen, found, layout, 1, 2, gpu, None, None).binds == "communication"


def test_the_smallest_change_that_fits() -> None:
    def way(gib: float, *changes: str) -> str:
        chosen = recipe.resolve("demo", [*TINY, *changes])
        fitting = Fitting(chosen, replace(machine("cpu"), memory=int(gib * GIB)), 100, 10)
        assert not fitting.best(chosen, 1).fits
        return ways_out(fitting, chosen, 1, 1)

    def sizes(*chunks: int) -> list[int]:
        chosen = recipe.resolve("demo", [*TINY, "encoder.norm=local", "engine.keep=0"])
        fitting = Fitting(chosen, replace(machine("cpu"), memory=GIB), 100, 10)
        return [fitting.fit(chosen, 1, 64, c, 0).memory.total for c in chunks]

    whole, half, quarter = (size / GIB for size in sizes(1, 2, 4))
    assert whole > half > quarter
    assert "engine.chunks=2 " in way((whole + half) / 2, "encoder.norm=local")
    assert "engine.chunks=4 " in way((half + quarter) / 2, "encoder.norm=local")
    assert "cannot be computed in chunks" in (said := way((whole + half) / 2)) and "data.batch=32 " in said


def test_the_command(kilobatch: Callable[..., Said]) -> None:
    said = kilobatch("plan", "demo", *TINY, "--gpu", "h100", "--gpus-per-node", "2", "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert told["ranks"] == 2 and told["samples_per_rank"] == 32 and told["steps"] == 120 * (1437 // 64)
    assert told["memory"]["total"] == sum(told["memory"]["parts"].values()) < told["memory"]["limit"]
    assert told["gpu_hours"] == pytest.approx(told["days"] * 24 * 2)
    assert {one["purpose"] for one in told["step"]["collectives"]} >= {"gradients", "BatchNorm's statistics"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["demo", "--gpu", "h1000"], "did you mean 'h100'?"),
        (["demo", "--nodes", "0"], "--nodes is 0"),
        (["demo", "--gpu", "h100", "--gpus-per-node", "3"], "does not divide over 3 workers"),
        (["simclr_imagenet", "--gpu", "h100"], "give --images"),
        (["demo", "--measured", "none.json"], "kilobatch bench --json none.json makes one"),
        (["demo", *TINY, "--gpu", "h100", "--memory", "0.001"], "use larger GPUs"),
    ],
)
def test_refusals(kilobatch: Callable[..., Said], arguments: list[str], told: str) -> None:
    said = kilobatch("plan", *arguments)
    assert said.code == 2 and told in " ".join(said.err.split()), said.err


def test_measured_rates_take_the_place_of_assumed_ones(kilobatch: Callable[..., Said], tmp_path: Path) -> None:
    rates = {"device": "cpu", "flops": 1e9, "views": 100.0, "link": 1e8, "latency": 1e-3}
    (tmp_path / "here.json").write_text(json.dumps({"rates": rates}))
    asked = ["plan", "demo", *TINY, "--measured", "here.json"]
    told = json.loads(kilobatch(*asked, "--gpus-per-node", "2", "--json").out)
    assert told["step"]["compute"] == pytest.approx(told["step"]["flops"] / 1e9)
    gradients = next(one for one in told["step"]["collectives"] if one["purpose"] == "gradients")
    assert gradients["seconds"] == pytest.approx(gradients["sent"] / 1e8 + 2e-3)
    said = kilobatch(*asked, "--gpu", "h100")
    assert said.code == 2 and "is of cpu, and --gpu is h100" in said.err
