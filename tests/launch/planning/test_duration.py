"""The time that a run takes: the range, what it rests on, the photographs' size, and the rates that bench has kept."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from kilobatch.data.sources.convert import convert, prepare
from kilobatch.data.sources.encoding import encoding_for_views
from kilobatch.data.sources.specs import open_source
from kilobatch.launch.cli.reports import bench
from kilobatch.launch.planning import own_rate
from kilobatch.launch.planning.duration import Setting, Span, estimate_duration, in_words
from kilobatch.launch.planning.fake_step import StepLayout, run_fake_step
from kilobatch.launch.planning.machines import find_machine
from kilobatch.launch.planning.photos import ASSUMED_SIDE, Photos, photos_of
from kilobatch.launch.planning.step_time import estimate_time
from kilobatch.launch.recipes.recipe import resolve_recipe
from kilobatch.trainer.bench.rates import BenchRow
from tests.helpers.own_cache import own_cache
from tests.helpers.real_runs import command
from tests.launch.cli.test_surroundings import ASCII
from tests.launch.conftest import CommandResult

TINY = ["data.batch=64", "data.views.size=32", "encoder.name=convnet", "encoder.width=8"]
IMAGENET = 1_281_167
PHOTOS = Photos(0.79 * 256**2, "photographs of 256 pixels")


def setting_of(name: str, gpu: str, nodes: int, images: int, *changes: str) -> Setting:
    recipe = resolve_recipe(name, list(changes))
    steps = recipe.schedule.epochs * (images // recipe.data.batch)
    return Setting(recipe, find_machine(gpu), nodes, images, steps, None, PHOTOS, None)


def test_the_range_of_resnet50_on_a100s_holds_nvidias_figure_and_a_cautious_one() -> None:
    """NVIDIA: 2,470 images a second on each (DeepLearningExamples, resnet50v1.5). Cautiously half of that, as MoCo's
    authors reached on V100s: 53 hours for 200 epochs, which the range of their training has to hold as well."""
    setting = setting_of("simclr_imagenet", "a100", 1, IMAGENET)
    layout = StepLayout(8, 512, 1)
    step = run_fake_step(setting.recipe, layout, IMAGENET, 1000)
    time = estimate_time(setting.recipe, step, layout, 1, 1, setting.machine, None, None, PHOTOS)
    found = estimate_duration(setting, step, layout, time)
    assert found is not None
    nvidia = 100 * IMAGENET * 2 / (8 * 2470)  # two views of each image
    assert found.training.least < nvidia < 2 * nvidia < found.training.most * 1.1 < 3 * nvidia
    assert found.images.least < 8 * 2470 / 2 < found.images.most
    assert found.images.least == pytest.approx(4096 / found.step.most)
    # Colours, communication and the framework's own time are in the cautious end, beside the encoder.
    assert found.step.most > time.flops / (0.54 * 29.4 * 2.039e12) + (time.communication or 0)


def test_the_range_of_mocos_training_holds_its_53_hours() -> None:
    setting = setting_of("moco_v1_imagenet", "v100", 1, IMAGENET, "engine.precision=fp32")
    layout = StepLayout(8, 32, 1)
    step = run_fake_step(setting.recipe, layout, IMAGENET, 1000)
    time = estimate_time(setting.recipe, step, layout, 1, 1, setting.machine, None, None, PHOTOS)
    found = estimate_duration(setting, step, layout, time)
    assert found is not None and setting.recipe.schedule.epochs == 200
    assert found.training.least < 53 * 3600 < found.training.most < 2.5 * found.training.least


def test_evaluations_are_in_the_whole_and_grow_with_what_they_look_at() -> None:
    def of(*changes: str) -> tuple[float, float]:
        setting = setting_of("demo", "a100", 1, 1437, *TINY, *changes)
        layout = StepLayout(1, 64, 1)
        step = run_fake_step(setting.recipe, layout, 1437, 10)
        time = estimate_time(setting.recipe, step, layout, 1, 1, setting.machine, None, None, PHOTOS)
        found = estimate_duration(setting, step, layout, time)
        assert found is not None and found.whole == found.training + found.evaluations
        forward = step.forward / (64 * 2)  # of a view
        return found.evaluations.least, forward / (1.06 * 11.2 * 2.039e12)

    none, _ = of("evaluate.final=[]", "evaluate.every_epochs=0")
    assert none == 0
    knn, image = of("evaluate.final=[knn]", "evaluate.every_epochs=0")
    assert knn == pytest.approx((1437 + 360) * image)
    linear, _ = of("evaluate.final=[linear]", "evaluate.linear.epochs=7", "evaluate.every_epochs=0")
    assert linear == pytest.approx((7 * 1437 + 360) * image)
    during, _ = of("evaluate.final=[]", "evaluate.every_epochs=10", "schedule.epochs=35")
    assert during == pytest.approx(3 * (1437 + 360) * image)


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [
        (0.1, 0.9, "less than a second"),
        (9.2, 14.1, "about 9.2 to 14 seconds"),
        (60, 119, "about 60 to 119 seconds"),
        (60, 121, "about 1 to 2 minutes"),
        (9 * 3600, 14 * 3600, "about 9 to 14 hours"),
        (10.2 * 3600, 10.4 * 3600, "about 10 hours"),
        (48 * 3600, 96 * 3600, "about 48 to 96 hours (2 to 4 days)"),
        (1000 * 3600, 2000 * 3600, "about 1,000 to 2,000 hours (42 to 83 days)"),
    ],
)
def test_times_in_words(least: float, most: float, words: str) -> None:
    assert in_words(Span(least, most)) == words


# The photographs' size


def test_the_size_of_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a .beton, of a source that was converted, as given, and assumed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KILOBATCH_CACHE", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 120, 80, 3), np.uint8)
    np.savez("photos.npz", images=pixels, labels=np.arange(4) % 2)
    convert(open_source("npz:photos.npz", "train"), Path("photos.beton"))

    def of(train: str, side: int | None = None) -> Photos:
        return photos_of(resolve_recipe("demo", [f"data.train={train}", "data.test=null"]), side)

    assert of("photos.beton") == Photos(9600, "photographs of 9,600 pixels in the mean, as photos.beton has them")
    assert of("photos.beton", 500) == Photos(
        0.79 * 500**2, "photographs of 500 pixels on the longer side (--photo-side)"
    )
    assert "assumption" in of("npz:photos.npz").source
    prepare("npz:photos.npz", "train", encoding_for_views(resolve_recipe("demo", []).data.groups[0].size))
    assert of("npz:photos.npz").pixels == 9600
    assert of("digits").pixels == 0
    gone = of("gone.beton")
    assert gone.pixels == 0.79 * ASSUMED_SIDE**2 and "--photo-side" in gone.source


def test_larger_photographs_take_more_of_the_loader() -> None:
    views = resolve_recipe("simclr_imagenet", []).data.groups[0]
    assert PHOTOS.seconds(views, True, None) == pytest.approx(2 / 4352)
    assert PHOTOS.seconds(views, False, None) == pytest.approx(2 / 2283)
    twice = Photos(2 * PHOTOS.pixels, "")
    assert twice.seconds(views, True, None) == pytest.approx(2 * 1.87 / 4352)


def test_a_side_of_nothing_is_refused(kilobatch: Callable[..., CommandResult]) -> None:
    assert "--photo-side is 0; it should be 1 or more" in kilobatch("plan", "demo", *TINY, "--photo-side", "0").err


# The rates that bench has kept


def kept(tmp_path: Path, flops: float, device: str = "cpu", **more: object) -> Path:
    """A result of bench as it is kept."""
    rates: bench.Rates = {"device": device, "flops": flops, "views": 100.0}
    row = BenchRow("loader", 100.0, 200.0, "views per core", "decoding")
    file = tmp_path / "cache" / "bench" / f"{device}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(bench.result_text(torch.device("cpu"), rates, [row]))
    assert content["rows"] == [asdict(row)]
    content["rates"] |= more
    file.write_text(json.dumps(content))
    return file


def test_bench_keeps_its_newest_result_whole(
    kilobatch: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = BenchRow("loader", 100.0, 200.0, "views per core", "decoding")
    rates: dict[str, float | str] = {"device": "cpu", "flops": 5e9, "views": 100.0}
    monkeypatch.setattr(bench, "_measure", lambda *arguments: ([row], rates))
    for flops in (5e9, 6e9):
        rates["flops"] = flops
        result = kilobatch("bench", "--device", "CPU", "--out", "here.json")
        assert f"written: {tmp_path}/cache/bench/cpu.json; kilobatch plan RECIPE uses it on this machine" in result.out
        assert "written: here.json; kilobatch plan RECIPE --measured here.json" in result.out
    file = tmp_path / "cache" / "bench" / "cpu.json"
    assert file.read_bytes() == (tmp_path / "here.json").read_bytes()
    assert json.loads(file.read_text())["rates"]["flops"] == 6e9
    assert [path.name for path in file.parent.iterdir()] == ["cpu.json"]


def test_a_plan_of_this_machine_uses_them_and_says_so(
    kilobatch: Callable[..., CommandResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(own_rate, "SECONDS", 0.0)
    arguments = ["plan", "demo", *TINY]
    unknown = "not estimated, as no rate of this machine is known; kilobatch bench measures it"
    assert unknown in kilobatch(*arguments, "--workers-per-node", "2").out  # two share its cores
    out = kilobatch(*arguments).out
    assert "at best: forward and backward of this encoder, measured on this machine just now" in out
    assert re.search(r"to the end: about .*\n", out) and "GFLOP per second in this encoder" in out
    assert not any(word in out for word in ("ZeRO", "collective", "communication"))  # one process on a CPU
    kept(tmp_path, 1e9)
    out = kilobatch(*arguments).out
    assert re.search(
        r"at best: a training step of another network, measured on this machine on [\d-]+ at [\d:]+ UTC", out
    )
    assert re.search(r"measured, in their place, on this machine on [\d-]+ at [\d:]+ UTC: 1.0 GFLOP per second", out)
    assert re.search(r"to the end: about [\d.]+ to [\d.]+ (seconds|minutes|hours)\n", out)
    (tmp_path / "other.json").write_text(json.dumps({"rates": {"device": "cpu", "flops": 2e9, "views": 9.0}}))
    plan = json.loads(kilobatch(*arguments, "--measured", "other.json", "--json").out)
    assert plan["measured"]["flops"] == 2e9
    assert json.loads(kilobatch(*arguments, "--json").out)["measured"]["flops"] == 1e9
    assert json.loads(kilobatch(*arguments, "--gpu", "a100", "--json").out)["measured"] is None


def test_those_of_a_gpu_are_for_its_own_kind(kilobatch: Callable[..., CommandResult], tmp_path: Path) -> None:
    kept(tmp_path, 7e13, "cuda", gpu="NVIDIA A100-SXM4-80GB")
    for gpu, flops in (("a100", 7e13), ("h100", None)):
        plan = json.loads(kilobatch("plan", "demo", *TINY, "--gpu", gpu, "--json").out)
        assert (plan["measured"] or {}).get("flops") == flops


def test_damaged_ones_are_refused(kilobatch: Callable[..., CommandResult], tmp_path: Path) -> None:
    kept(tmp_path, 1e9).write_text('{"rates": {"dev')
    result = kilobatch("plan", "demo", *TINY)
    assert result.code == 2 and "bench/cpu.json is not what kilobatch bench writes; remove it, or run" in result.err


def test_in_a_narrow_locale_of_ascii_without_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines in their order."""
    for name, value in {**ASCII, "KILOBATCH_CACHE": own_cache(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    launcher = command("plan", "demo", *TINY, "--gpu", "A100-SXM4-80GB", "--gpus-per-node", "2")
    launcher.ends(0, 300)
    launcher.printed.seek(0)
    out = " ".join(launcher.printed.read().decode("ascii").split())
    order = ["memory of a rank", "GiB", "optimizer by ZeRO stage", "sent by a rank"]
    order += ["time of a step at the published rate: ", "milliseconds (compute "]
    order += ["speed: ", "images per second", "training: about ", "evaluations: less", "to the end: about "]
    order += ["GPU hours", "this rests on: at best: 6% more than ResNet-50's training as NVIDIA publishes it"]
    order += ["cautiously: 54% of NVIDIA's figure, as MoCo's authors reached", "colour operations on the GPU"]
    order += ["cautiously: at least 2.", "milliseconds a step, in which Python starts its operations"]
    order += ["loader: images that are stored as they are", "evaluations: knn after every 20 epochs and moved"]
    order += ["assumed, not measured"]
    places = [out.find(part) for part in order]
    assert -1 not in places and places == sorted(places), list(zip(places, order, strict=True))
