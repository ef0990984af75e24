"""Training by kilobatch and by lightly: images per second and k-NN of the same training, on this machine's processors.

    python -m benchmarks.training --source cifar10:FOLDER
    python -m benchmarks.training --source folder:PHOTOGRAPHS --size 64 --widths 16 --batch 256

Both get the same images, views, encoder of six convolutions, head, batch, AdamW and schedule. Of a folder lightly reads
the files, as its data set does; of another source an array in memory, as torchvision's CIFAR10 is. kilobatch is the
command `kilobatch train` with two workers, everything that a run writes included: once in fp32, and once as it is by
default (`engine.precision: auto`). lightly is its example's loop (benchmarks/training/lightly_loop.py), in fp32 and
under torch.autocast with bf16. It runs in that form of FORMS which is the quickest in fp32 in a training of two epochs
first: one process with two threads and one or two loading processes, or two processes.

They take turns, whole trainings with the seeds 0, 1, …; the rate is that of all epochs but the first, and a ratio is of
one round. k-NN (k 200, temperature 0.1) is from the training images to the test images, by the same code for both, in
fp32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.training.lightly_loop import FORMS, Form, Model
from benchmarks.training.setting import RECIPE, Images, Setting, images_of
from kilobatch import load_encoder
from kilobatch.data.loading.preprocess import Preprocess
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.specs import open_source
from kilobatch.trainer.evaluate import knn
from kilobatch.trainer.evaluate.features import Features
from kilobatch.trainer.evaluate.options import KNNOptions

PROCESSORS = 2
LIGHTLY = "lightly, fp32"
Found = Mapping[str, list[tuple[float, float]]]  # images per second and k-NN accuracy, of each round
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Trained:
    """Images per second, the encoder and, of ours, how it is given images."""

    rate: float
    encoder: nn.Module
    preprocess: Preprocess | None = None


def train_ours(setting: Setting, precision: str, out: Path) -> Trained:
    """Trains by the command, and reads the rate from the run's metrics."""
    name, workers = f"{precision}-{setting.width}-{setting.seed}", ["--workers", str(PROCESSORS)]
    changes = [*setting.changes(precision), f"run.name={name}", f"run.folder={out}"]
    command = [sys.executable, "-m", "kilobatch", "train", RECIPE, *changes, *workers]
    subprocess.run(command, env=os.environ | ONE_THREAD, check=True, stdout=subprocess.PIPE)
    rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/seconds" in row]
    steps = seconds = 0.0
    for before, row in zip(rows[:-1], rows[1:], strict=True):
        if before["train/epoch"] >= 1:
            steps += row["step"] - before["step"]
            seconds += row["train/seconds"]  # since the row before
    encoder, preprocess = load_encoder(out / name)
    return Trained(steps * setting.batch / seconds, encoder, preprocess)


def train_theirs(images: int, setting: Setting, form: Form, bf16: bool, out: Path) -> Trained:
    task = {"setting": asdict(setting), "form": asdict(form), "bf16": bf16, "out": str(out)}
    command = [sys.executable, "-m", "benchmarks.training.lightly_loop"]
    if form.processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(form.processes)]
        command = [sys.executable, *start, *command[1:]]
    subprocess.run(command, env=os.environ | {"TRAINING_TASK": json.dumps(task)}, check=True)
    model = Model(setting.width)
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    seconds = json.loads((out / "seconds.json").read_text())[1:]
    seen = images // setting.batch * setting.batch
    return Trained(seen * len(seconds) / sum(seconds), model.encoder.eval())


@torch.no_grad()
def features_of(encoder: nn.Module, images: Tensor, labels: Tensor) -> Features:
    """images (N, 3, size, size), as the encoder takes them."""
    return Features(torch.cat([encoder(part) for part in images.split(512)]).float(), labels)


def quickest_form(images: int, setting: Setting, out: Path) -> Form:
    short = replace(setting, epochs=2)
    rates = {form: train_theirs(images, short, form, False, out).rate for form in FORMS}
    print("lightly:", ", ".join(f"{form}: {rate:,.0f} images/s" for form, rate in rates.items()), flush=True)
    return max(rates, key=rates.__getitem__)


def one_round(images: int, setting: Setting, form: Form, out: Path) -> Iterator[tuple[str, Trained]]:
    """Trains once each; whoever is first in one round is last in the next but one."""
    entries: list[tuple[str, Callable[[], Trained]]] = [
        (LIGHTLY, lambda: train_theirs(images, setting, form, False, out)),
        ("kilobatch, fp32", lambda: train_ours(setting, "fp32", out)),
        ("kilobatch, by default", lambda: train_ours(setting, "auto", out)),
        ("lightly, autocast", lambda: train_theirs(images, setting, form, True, out)),
    ]
    for k in range(len(entries)):
        who, trained_by = entries[(k + setting.seed) % len(entries)]
        yield who, trained_by()


def measure(setting: Setting, rounds: int, bank: Images, test: Images, out: Path) -> tuple[Form, Found]:
    """The form that lightly ran in, and (rate, k-NN accuracy) of each round."""
    form, found = quickest_form(len(bank[0]), setting, out), defaultdict[str, list[tuple[float, float]]](list)
    prepared: list[tuple[Tensor, Tensor]] = []
    for seed in range(rounds):
        done = dict(one_round(len(bank[0]), replace(setting, seed=seed), form, out))
        preprocess = done["kilobatch, fp32"].preprocess
        assert preprocess
        prepared = prepared or [
            (torch.stack([preprocess(x) for x in images]), labels) for images, labels in (bank, test)
        ]
        for who, trained in done.items():
            features = [features_of(trained.encoder, *images) for images in prepared]
            score = knn.accuracy(features[0], features[1], KNNOptions(k=200, temperature=0.1))
            found[who].append((trained.rate, score))
            print(f"width {setting.width}, seed {seed}, {who}: {trained.rate:,.0f} images/s, {score:.1%}", flush=True)
    return form, found


def show(width: int, form: Form, found: Found) -> None:
    table = Table(
        "who", "images/s", "to lightly, fp32", "of the rounds", "k-NN", title=f"width {width}; lightly: {form}"
    )
    for who, rows in sorted(found.items()):
        ratios = [mine[0] / theirs[0] for mine, theirs in zip(rows, found[LIGHTLY], strict=True)]
        table.add_row(
            who,
            f"{median(rate for rate, _ in rows):,.0f}",
            f"{median(ratios):.2f}x",
            " ".join(f"{ratio:.2f}" for ratio in ratios),
            f"{100 * mean(score for _, score in rows):.1f} % ({' '.join(f'{100 * x:.1f}' for _, x in rows)})",
        )
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="cifar10:datasets", help="of images with a train and a test split")
    parser.add_argument("--images", type=int, help="to train on, of a source that is no folder; default: all")
    parser.add_argument("--test-images", type=int, default=4000)
    parser.add_argument("--size", type=int, default=32, help="of the views, in pixels")
    parser.add_argument("--widths", type=int, nargs="+", default=[32])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    opened = open_source(options.source, "train")
    bank = images_of(options.source, "train", None if isinstance(opened, Folder) else options.images)
    test = images_of(options.source, "test", options.test_images)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(opened, Folder):
            train = f"folder:{opened.path}"
        else:
            train = f"npz:{folder}/train.npz"
            np.savez(train.removeprefix("npz:"), images=np.stack(bank[0]), labels=bank[1].numpy())
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for width in options.widths:
            setting = Setting(train, options.size, width, options.epochs, options.batch, seed=0)
            show(width, *measure(setting, options.rounds, bank, test, Path(folder)))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
