"""A run's logs, pictures and lines on the terminal; logs of a resumed run equal those of an uninterrupted one."""

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kilobatch.trainer.evaluate.image_sample import ImageSample
from kilobatch.trainer.evaluate.images import grid, to_bytes
from kilobatch.trainer.monitor import progress_bar, progress_file
from kilobatch.trainer.monitor.metrics_file import truncate_metrics
from kilobatch.trainer.monitor.monitor import TIMINGS, Monitor
from kilobatch.trainer.monitor.progress_file import Progress

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def train(folder: Path, first: int, last: int, total: int = 12) -> None:
    """Logs steps first to last as a training would; its numbers depend on the step alone."""
    monitor = Monitor(folder, total, first - 1, 3, quiet())
    if first > 1 and (first - 1) % 4 == 0:  # the evaluation that was due at the checkpoint
        monitor.log(first - 1, {"knn/top1": (first - 1) / 7})
    for step in range(first, last + 1):
        monitor.count(64, 0.001)
        if step % 2 == 0:
            monitor.log(step, {"train/loss": 1 / (3 * step), "train/lr": 0.1 * step} | monitor.rates())
        monitor.progress(step)
        if step % 4 == 0:
            monitor.log(step, {"knn/top1": step / 7})
    monitor.close()


def lines(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMINGS} for line in found]


def test_progress_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, 1, 9)
    found = Progress.of(tmp_path)
    assert found is not None
    assert (found.step, found.steps, found.epoch, found.epochs) == (8, 12, 2.0, 3)  # written at the evaluation's end
    assert (found.loss, found.knn) == (1 / (3 * 8), 8 / 7)
    assert found.images_per_second and found.data_wait and found.seconds_left
    monkeypatch.setattr(progress_file, "EVERY", 0.0)
    Monitor(tmp_path, 12, 4, 3, quiet()).close()  # resumed
    found = Progress.of(tmp_path)
    assert found is not None
    assert (found.step, found.loss, found.knn, found.seconds_left) == (4, None, 8 / 7, None)
    train(tmp_path, 5, 12)
    found = Progress.of(tmp_path)
    assert found is not None
    assert (found.step, found.epoch, found.seconds_left) == (12, 3.0, 0.0)
    assert sorted(path.name for path in tmp_path.glob("*progress*")) == ["progress.json"]


def test_progress_is_written_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 100.0
    monkeypatch.setattr(progress_file.time, "monotonic", lambda: clock)
    writer = progress_file.ProgressWriter(tmp_path, 50, 0, 1)
    written = []
    for step in range(1, 50):
        clock += 1.0
        writer.move(step, None)
        writer.show({"train/loss": 1.0})
        found = Progress.of(tmp_path)
        assert found is not None
        written.append(found.step)
    assert sorted(set(written)) == list(range(0, 50, 5))


def test_floats_come_back_bit_for_bit(tmp_path: Path) -> None:
    train(tmp_path, 1, 12)
    logged = [line for line in lines(tmp_path) if "train/loss" in line]
    assert [line["train/loss"] for line in logged] == [1 / (3 * step) for step in range(2, 13, 2)]
    raw = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert set(TIMINGS) <= raw.keys()
    assert raw["train/data_wait"] > 0


def test_resumed_log_equals_the_uninterrupted(tmp_path: Path) -> None:
    train(tmp_path / "whole", 1, 12)
    train(tmp_path / "killed", 1, 9)
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "train/lo')  # killed while it wrote
    train(tmp_path / "killed", 5, 12)  # its last checkpoint was of step 4
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


@pytest.mark.parametrize(("start", "kept"), [(0, 0), (1, 1), (2, 2), (3, 3), (9, 4)])
def test_truncate_metrics(tmp_path: Path, start: int, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, start)
    assert not path.exists()
    rows = ['{"step": 1, "train/loss": 3}', '{"step": 2, "train/loss": 2}', '{"step": 2, "knn/top1": 1}']
    rows = [row + "\n" for row in [*rows, '{"step": 5, "train/loss": 1}']]
    path.write_text("".join(rows) + '{"step": 6')
    truncate_metrics(path, start)
    assert path.read_text() == "".join(rows[:kept])


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    train(tmp_path, 1, 9)
    train(tmp_path, 5, 12)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert not [tag for tag in events.Tags()["scalars"] if "/" not in tag]  # each would be shown in a group of its own
    for name in ("train/loss", "train/lr", "knn/top1"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert shown == pytest.approx({line["step"]: line[name] for line in lines(tmp_path) if name in line})


def test_views_are_drawn_as_they_were(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (20, 2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    views = (images / 255 - mean) / std
    assert torch.equal(to_bytes(views, MEAN, STD), images)
    monitor = Monitor(tmp_path, 1, 0, 1, quiet())
    monitor.images([views], MEAN, STD)
    monitor.picture(7, tmp_path / "pictures" / "views.png")
    monitor.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.width, event.height) for event in events.Images("views")] == [
        (0, 8 * 98 + 2, 2 * (2 * 98 + 6) - 4),
        (7, 8 * 98 + 2, 2 * (2 * 98 + 6) - 4),
    ]
    picture = np.asarray(Image.open(tmp_path / "pictures" / "views.png"))
    assert picture.shape == (2 * (2 * 98 + 6) - 4, 8 * 98 + 2, 3)  # 16 samples in two bands, 32 px enlarged thrice
    assert np.array_equal(picture[3:99:3, 3:99:3], images[0, 0].permute(1, 2, 0))
    assert np.array_equal(picture[101:197:3, 101:197:3], images[1, 1].permute(1, 2, 0))


def test_each_group_of_views_has_a_strip(tmp_path: Path) -> None:
    groups = [torch.rand(8, count, 3, size, size) for count, size in ((2, 96), (3, 40))]
    monitor = Monitor(tmp_path, 1, 0, 1, quiet())
    monitor.images(groups, (0, 0, 0), (1, 1, 1))
    monitor.close()
    picture = np.asarray(Image.open(tmp_path / "pictures" / "views.png")).transpose(2, 0, 1)
    first, second = (grid(to_bytes(group, (0, 0, 0), (1, 1, 1))).numpy() for group in groups)
    assert np.array_equal(picture[:, : first.shape[1]], first)
    assert np.array_equal(picture[:, first.shape[1] :, : second.shape[2]], second)
    assert (picture[:, first.shape[1] :, second.shape[2] :] == 255).all() and first.shape[2] > second.shape[2]


def test_grid_of_large_views_is_not_enlarged() -> None:
    assert grid(torch.zeros(3, 2, 3, 128, 128, dtype=torch.uint8)).shape == (3, 2 * 130 + 2, 8 * 130 + 2)


def test_projector(tmp_path: Path) -> None:
    sample = ImageSample(torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 1]), torch.zeros(5, 3, 8, 8, dtype=torch.uint8))
    monitor = Monitor(tmp_path, 10, 0, 1, quiet())
    monitor.embedding(10, sample, ["n02121808 cat", "dog"])
    monitor.close()
    (metadata,) = tmp_path.rglob("metadata.tsv")
    assert metadata.read_text().split() == ["cat", "dog", "cat", "dog", "dog"]
    assert list(tmp_path.rglob("sprite.png"))


def test_plain_lines_when_not_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_bar, "EVERY", 0.0)
    console = quiet()
    shown = progress_bar.Lines(console, 100)
    shown.move(40, None)
    shown.show({"train/loss": 1.25, "train/images_per_second": 2345.6, "train/data_wait": 0.031})
    shown.show({"epoch": 4, "knn/top1": 0.5})
    shown.move(41, 59.0)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "step 40/100",
        "epoch 4: k-NN top-1 50.0%",
        "step 41/100  loss 1.2500  2,346 images/s  data wait 3%  0:00:59 to go",
    ]


@pytest.mark.parametrize("start", [0, 30])
def test_rates_and_time_to_go_agree_and_leave_the_start_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: int
) -> None:
    """The first step takes 40 s, each other one 2 s, and the evaluation between two of them 6 s."""
    clock = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    monkeypatch.setattr(progress_bar, "EVERY", 0.0)
    console = quiet()
    monitor = Monitor(tmp_path, start + 10, start, 1, console)
    for step in range(start + 1, start + 6):
        clock += 40 if step == start + 1 else 2
        monitor.count(64, 0.5)
        if step != start + 3:
            monitor.log(step, {"train/loss": 1.0} | monitor.rates())
        monitor.progress(step)
        if step == start + 3:
            clock += 6
            monitor.begin_interval()
    monitor.close()
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue().splitlines()
    assert shown[0] == f"step {start + 1}/{start + 10}  loss 1.0000"
    assert shown[2] == f"step {start + 3}/{start + 10}  loss 1.0000  32 images/s  data wait 25%  0:00:14 to go"
    # 8 s of 4 steps and 6 s of an evaluation: 3.5 s a step for the 5 that are left
    assert shown[4] == f"step {start + 5}/{start + 10}  loss 1.0000  32 images/s  data wait 25%  0:00:18 to go"
    found = Progress.of(tmp_path)
    assert found is not None and found.images_per_second is None  # it was written before the second interval
    first, *others = [line["train/images_per_second"] for line in map(json.loads, (tmp_path / "metrics.jsonl").open())]
    assert first == 64 / 40 and others == [32.0] * 3, "the file has each interval's own rate"


def test_bar_on_a_terminal(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160, force_terminal=True)
    monitor = Monitor(tmp_path, 10, 4, 1, console)
    for step in range(5, 11):
        monitor.count(64, 0.0)
        monitor.log(step, {"train/loss": 0.5} | monitor.rates())
        monitor.progress(step)
    monitor.say("saved")
    monitor.close()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "10/10" in text
    assert "loss 0.5000" in text
    assert "saved" in text
