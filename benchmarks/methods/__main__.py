"""Every method on 10,000 images of CIFAR-10: k-NN after one budget of epochs, by one rule for the rates of all.

    python -m benchmarks.methods --source cifar10:FOLDER --out FILE
    python -m benchmarks.methods --source cifar10:FOLDER --quick

An encoder of six convolutions in bf16, AdamW with a cosine, the same views; a method has of its own what its paper
fixes (its recipe's heads, temperatures, momenta, queues; a jigsaw as PIRL's second view). Nothing is tuned by method.
Beside them: raw pixels, an untrained encoder, and lightly's implementation of a method in the same loop, seed 0, where
lightly is installed: our loader's batches, the same encoder, optimizer and schedule under autocast.

k-NN (k 200, temperature 0.1) is from the training images to all test images, in fp32. Each training is a line of the
file `--out`; those that it has are not done again, so that a stopped benchmark goes on. All take about ten hours on two
processors, --quick takes minutes and shows no more than that every row runs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.methods.setting import RECIPES, Setting
from benchmarks.training.setting import Images, images_of, plain_encoder
from kilobatch.data.loading.loader import Loader, LoaderWorker
from kilobatch.data.loading.preprocess import Preprocess
from kilobatch.data.sources.convert import prepare
from kilobatch.launch.runs.final_evaluation import read_final_evaluation
from kilobatch.trainer.evaluate import knn
from kilobatch.trainer.evaluate.features import Features
from kilobatch.trainer.evaluate.options import KNNOptions
from kilobatch.trainer.optim.schedules import lr_at

PIXELS, UNTRAINED = "raw pixels", "untrained encoder"
KNN = KNNOptions(k=200, temperature=0.1)
PEER = "lightly"
Row = tuple[str, str, int]  # whose implementation, method, seed
WORKERS = 2


class Bench:
    """The images, as both implementations are given them, and the trainings by row.

    train, test: each images and labels; folder: for runs and files, which is not kept.
    """

    def __init__(self, setting: Setting, test_source: str, train: Images, test: Images, folder: Path) -> None:
        self.setting, self.test_source, self.folder = setting, test_source, folder
        preprocess = Preprocess(setting.views)
        self.train, self.test = [
            (torch.stack([preprocess(x) for x in images]), labels) for images, labels in (train, test)
        ]

    def accuracy(self, row: Row) -> float:
        who, name, seed = row
        if name == PIXELS:
            return self._knn(nn.Flatten())
        if name == UNTRAINED:
            torch.manual_seed(seed)
            return self._knn(plain_encoder(self.setting.width))
        return self._peer(name, seed) if who == PEER else self._ours(name, seed)

    def _ours(self, name: str, seed: int) -> float:
        run = f"{name}-{seed}"
        changes = [*self.setting.changes(name, self.test_source, seed), f"run.name={run}", f"run.folder={self.folder}"]
        command = [sys.executable, "-m", "kilobatch", "train", RECIPES[name], *changes, "--workers", str(WORKERS)]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, stdout=subprocess.PIPE)
        found = read_final_evaluation(self.folder / run)
        assert found, f"{run} has no evaluation"
        return found.parts["knn"].logged["final/knn/top1"]

    def _peer(self, name: str, seed: int) -> float:
        """Trains lightly's implementation in a plain loop."""
        from benchmarks.methods.lightly_methods import LIGHTLY_METHODS

        torch.manual_seed(seed)
        setting, peer = (
            self.setting,
            LIGHTLY_METHODS[name](plain_encoder(self.setting.width), 8 * self.setting.width).train(),
        )
        trained = [p for p in peer.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": setting.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer, step = torch.optim.AdamW(groups, lr=setting.lr), 0
        worker = LoaderWorker(rank=0, world=1, threads=1, device=torch.device("cpu"))
        views = setting.views.model_copy(update={"count": 2})
        with Loader(prepare(setting.source, "train"), views, worker, batch=setting.batch, seed=seed) as loader:
            steps = loader.steps_per_epoch
            for epoch in range(setting.epochs):
                for batch in loader.epoch(epoch):
                    for group in optimizer.param_groups:
                        group["lr"] = lr_at(setting.schedule, setting.lr, step, steps)
                    peer.before_step(step, steps * setting.epochs)
                    first, second = batch.views[0].unbind(1)
                    with torch.autocast("cpu", torch.bfloat16):
                        loss = peer.loss(first, second, epoch)
                    loss.backward()
                    peer.before_optimizer(epoch)
                    optimizer.step()
                    optimizer.zero_grad()
                    step += 1
        return self._knn(peer.evaluated())

    @torch.no_grad()
    def _knn(self, encoder: nn.Module) -> float:
        def features_of(images: Tensor, labels: Tensor) -> Features:
            return Features(torch.cat([encoder.eval()(part) for part in images.split(512)]).float(), labels)

        return knn.accuracy(features_of(*self.train), features_of(*self.test), KNN)


def rows(methods: list[str], seeds: int, with_peer: bool) -> Iterator[Row]:
    """All trainings, those of seed 0 first."""
    for seed in range(seeds):
        yield from (("", name, seed) for name in ([PIXELS] if seed == 0 else []) + [UNTRAINED])
        for name in methods:
            yield "", name, seed
            if with_peer and seed == 0:
                from benchmarks.methods.lightly_methods import LIGHTLY_METHODS

                if name in LIGHTLY_METHODS:
                    yield PEER, name, seed


def known(out: Path, setting: Setting, images: int) -> dict[Row, float]:
    """The trainings of this setting that the file has."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    same = asdict(setting) | {"images": images}
    del same["source"]
    return {(line["who"], line["method"], line["seed"]): line["knn"] for line in lines if same.items() <= line.items()}


def show(found: dict[Row, float]) -> None:
    """Prints a table: the mean of seeds with its standard error, and lightly's accuracy beside it."""
    table = Table("method", "k-NN, %", "seeds", "lightly, seed 0, %")
    by_method = defaultdict[str, list[float]](list)
    for (who, name, _), accuracy in found.items():
        if not who:
            by_method[name].append(accuracy)
    for name, values in by_method.items():
        error = f" ± {100 * stdev(values) / sqrt(len(values)):.1f}" if len(values) > 1 else ""
        peer = found.get((PEER, name, 0))
        single = " ".join(f"{100 * value:.1f}" for value in values)
        table.add_row(name, f"{100 * mean(values):.1f}{error}", single, "" if peer is None else f"{100 * peer:.1f}")
    Console(width=120).print(table)


def main() -> None:
    """Trains what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="cifar10:datasets", help="of images with a train and a test split")
    parser.add_argument("--out", type=Path, default=Path("methods.jsonl"), help="a line for each training")
    parser.add_argument("--methods", nargs="+", choices=sorted(RECIPES), default=[*RECIPES], metavar="NAME")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--without-lightly", action="store_true")
    parser.add_argument("--quick", action="store_true", help="2,000 images, 2 epochs, width 8, one seed")
    options = parser.parse_args()
    if options.quick:
        options.images, options.epochs, options.width, options.seeds = 2_000, 2, 8, 1
    train, test = images_of(options.source, "train", options.images), images_of(options.source, "test", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = []
        for split, (images, labels) in (("train", train), ("test", test)):
            np.savez(folder / f"{split}.npz", images=np.stack(images), labels=labels.numpy())
            sources.append(f"npz:{folder}/{split}.npz")
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        torch.set_num_threads(WORKERS)
        setting = Setting(sources[0], options.width, options.epochs)
        bench = Bench(setting, sources[1], train, test, folder)
        for row in rows(options.methods, options.seeds, not options.without_lightly):
            if row in known(options.out, setting, options.images):
                continue
            began, accuracy = time.monotonic(), bench.accuracy(row)
            kept = asdict(setting) | {"images": options.images, "seconds": round(time.monotonic() - began)}
            del kept["source"]
            who, method, seed = row
            line = {"who": who, "method": method, "seed": seed, "knn": accuracy, **kept}
            with options.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{who} {method}, seed {seed}: {accuracy:.1%} in {line['seconds']} s".lstrip(), flush=True)
        show(known(options.out, setting, options.images))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
