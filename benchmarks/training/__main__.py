"""Training by kilobatch and by lightly: images per second and k-NN of the same training, on this machine's processors.

    python -m benchmarks.training --train cifar10:FOLDER
    python -m benchmarks.training --train cifar10:FOLDER --images 10240 --widths 16 32 64 --epochs 10 --rounds 3

Both get the same images, views, encoder of six convolutions, head, batch, AdamW and schedule. kilobatch is the command
`kilobatch train` with two workers, everything that a run writes included: once in fp32, and once as it is by default
(`engine.precision: auto`). lightly is its example's loop (benchmarks/training/lightly_loop.py), in fp32 and under
torch.autocast with bf16. It runs in that form of FORMS which is the quickest in fp32 in a training of two epochs first:
one process with two threads and one or two loading processes, or two processes.

They take turns, whole trainings with the seeds 0, 1, …; the rate is that of all epochs but the first, and a ratio is of
one round. k-NN (k 200, temperature 0.1) is from the training images to the test images, by the same code for
both, in fp32.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
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
from benchmarks.training.setting import MEAN, RECIPE, STD, Setting, read_images
from kilobatch import load_encoder
from kilobatch.trainer.evaluate import knn
from kilobatch.trainer.evaluate.features import Features
from kilobatch.trainer.evaluate.options import KNNOptions

PROCESSORS = 2
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Trained:
    """Images per second, and the encoder."""

    rate: float
    encoder: nn.Module


def train_ours(train: Path, setting: Setting, precision: str, out: Path) -> Trained:
    """Trains by the command, and reads the rate from the run's metrics."""
    name, workers = f"{precision}-{setting.width}-{setting.seed}", ["--workers", str(PROCESSORS)]
    changes = [*setting.changes(train, precision), f"run.name={name}", f"run.folder={out}"]
    command = [sys.executable, "-m", "kilobatch", "train", RECIPE, *changes, *workers]
    subprocess.run(command, env=os.environ | ONE_THREAD, check=True, stdout=subprocess.PIPE)
    rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/seconds" in row]
    steps = seconds = 0.0
    for before, row in zip(rows[:-1], rows[1:], strict=True):
        if before["train/epoch"] >= 1:
            steps += row["step"] - before["step"]
            seconds += (row["step"] - before["step"]) * row["train/seconds"]
    encoder, _ = load_encoder(str(out / name))
    return Trained(steps * setting.batch / seconds, encoder)


def train_theirs(train: Path, setting: Setting, form: Form, bf16: bool, out: Path) -> Trained:
    task = {"setting": setting.as_dict(), "form": asdict(form), "train": str(train), "bf16": bf16, "out": str(out)}
    command = [sys.executable, "-m", "benchmarks.training.lightly_loop"]
    if form.processes > 1:
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(form.processes)]
        command = [sys.executable, *start, *command[1:]]
    subprocess.run(command, env=os.environ | {"TRAINING_TASK": json.dumps(task)}, check=True, stderr=subprocess.PIPE)
    model = Model(setting.width)
    model.load_state_dict(torch.load(out / "model.pt", weights_only=True))
    seconds = json.loads((out / "seconds.json").read_text())[1:]
    images = len(np.load(train)["images"]) // setting.batch * setting.batch
    return Trained(images * len(seconds) / sum(seconds), model.encoder.eval())


@torch.no_grad()
def features_of(encoder: nn.Module, images: np.ndarray, labels: np.ndarray) -> Features:
    scale = torch.tensor(STD).view(3, 1, 1)
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(MEAN).view(3, 1, 1)) / scale
    parts: list[Tensor] = [encoder(part) for part in x.split(512)]
    return Features(torch.cat(parts).float(), torch.from_numpy(labels))


def show(found: dict[tuple[int, str], list[tuple[float, float]]], forms: dict[int, Form]) -> None:
    table = Table("width", "who", "images/s", "to lightly, fp32", "of the rounds", "k-NN", title=str(forms))
    for (width, who), rows in found.items():
        peer = found[width, "lightly, fp32"]
        ratios = [mine[0] / theirs[0] for mine, theirs in zip(rows, peer, strict=True)]
        table.add_row(
            str(width),
            who,
            f"{median(rate for rate, _ in rows):,.0f}",
            f"{median(ratios):.2f}x",
            " ".join(f"{ratio:.2f}" for ratio in ratios),
            f"{100 * mean(score for _, score in rows):.1f} % ({' '.join(f'{100 * x:.1f}' for _, x in rows)})",
        )
    Console(width=120).print(table)


def quickest_form(train: Path, setting: Setting, out: Path) -> Form:
    short = replace(setting, epochs=2)
    rates = {form: train_theirs(train, short, form, False, out).rate for form in FORMS}
    print("lightly:", ", ".join(f"{form}: {rate:,.0f} images/s" for form, rate in rates.items()), flush=True)
    return max(rates, key=rates.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", default="cifar10:datasets", help="a source of 32-pixel images, as in data.train")
    parser.add_argument("--images", type=int, default=10240, help="to train on")
    parser.add_argument("--test-images", type=int, default=4000)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    bank, test = (
        read_images(options.train, "train", options.images),
        read_images(options.train, "test", options.test_images),
    )
    found: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    forms: dict[int, Form] = {}
    with tempfile.TemporaryDirectory() as folder:
        out, train = Path(folder), Path(folder, "train.npz")
        np.savez(train, images=bank[0], labels=bank[1])
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        for width in options.widths:
            setting = Setting(width, options.epochs, options.batch, seed=0)
            form = forms[width] = quickest_form(train, setting, out)
            for seed in range(options.rounds):
                now = replace(setting, seed=seed)
                entries: dict[str, Callable[[Setting], Trained]] = {
                    "lightly, fp32": lambda now, form=form: train_theirs(train, now, form, False, out),
                    "kilobatch, fp32": lambda now: train_ours(train, now, "fp32", out),
                    "kilobatch, by default": lambda now: train_ours(train, now, "auto", out),
                    "lightly, autocast": lambda now, form=form: train_theirs(train, now, form, True, out),
                }
                for who, trained_by in entries.items():
                    trained = trained_by(now)
                    features = features_of(trained.encoder, *bank), features_of(trained.encoder, *test)
                    score = knn.accuracy(*features, KNNOptions(k=200, temperature=0.1))
                    found[width, who].append((trained.rate, score))
                    print(f"width {width}, seed {seed}, {who}: {trained.rate:,.0f} images/s, {score:.1%}", flush=True)
        dist.destroy_process_group()
    show(found, forms)


if __name__ == "__main__":
    main()
