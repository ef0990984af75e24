"""SimCLR as lightly's own example trains it: its data set, transform, head and loss in a plain loop of torch.

It runs as one process with as many threads as asked, or as several with DistributedDataParallel, where each normalises
by its own part of the batch as DistributedDataParallel does, and the loss gathers the views of all.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightly.data import LightlyDataset  # pyright: ignore[reportMissingImports]
from lightly.loss import NTXentLoss  # pyright: ignore[reportMissingImports]
from lightly.models.modules.heads import SimCLRProjectionHead  # pyright: ignore[reportMissingImports]
from lightly.transforms import SimCLRTransform  # pyright: ignore[reportMissingImports]
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from benchmarks.training.setting import Setting, plain_encoder
from kilobatch.trainer.optim.schedules import lr_at


@dataclass(frozen=True)
class Form:
    """How the loop uses the processors. processes: of training; threads and loaders: of each of them."""

    processes: int
    threads: int
    loaders: int

    def __str__(self) -> str:
        return f"{self.processes} x ({self.threads} threads, {self.loaders} loaders)"


FORMS = Form(1, 2, 1), Form(1, 2, 2), Form(2, 1, 1)


class Arrays(Dataset):
    """Images as torchvision's CIFAR10 has them: an array, of which each item becomes a Pillow image."""

    transform: Any = None  # LightlyDataset sets it

    def __init__(self, file: str) -> None:
        with np.load(file) as arrays:
            self.images, self.labels = arrays["images"], arrays["labels"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = plain_encoder(width)
        self.head = SimCLRProjectionHead(8 * width, 8 * width, 128)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def loader_of(setting: Setting, form: Form) -> DataLoader:
    transform = SimCLRTransform(setting.size, cj_strength=setting.strength, gaussian_blur=setting.blur)
    scheme, _, path = setting.train.partition(":")
    if scheme == "folder":
        data = LightlyDataset(path, transform=transform)
    else:
        data = LightlyDataset.from_torch_dataset(Arrays(path), transform=transform)
    sampler = DistributedSampler(data, seed=setting.seed, drop_last=True) if form.processes > 1 else None
    return DataLoader(
        data,
        batch_size=setting.batch // form.processes,
        sampler=sampler,
        shuffle=sampler is None,
        drop_last=True,
        num_workers=form.loaders,
        persistent_workers=form.loaders > 0,
    )


def epochs_of(model: nn.Module, loader: DataLoader, setting: Setting, bf16: bool) -> Iterator[float]:
    """Trains; yields the seconds of each epoch."""
    criterion = NTXentLoss(temperature=setting.temperature, gather_distributed=dist.is_initialized())
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0)
    step = 0
    for epoch in range(setting.epochs):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        began = time.perf_counter()
        for (first, second), *_ in loader:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(setting.schedule, setting.lr, step, len(loader))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                z1, z2 = model(first), model(second)
            loss = criterion(z1.float(), z2.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        yield time.perf_counter() - began


def one_process(setting: Setting, form: Form, bf16: bool, out: Path) -> None:
    """Trains, and writes the seconds of the epochs and the encoder's weights in rank 0."""
    torch.set_num_threads(form.threads)
    torch.manual_seed(setting.seed)
    model: nn.Module = Model(setting.width)
    if form.processes > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    seconds = list(epochs_of(model, loader_of(setting, form), setting, bf16))
    if not dist.is_initialized() or dist.get_rank() == 0:
        plain = model.module if isinstance(model, DistributedDataParallel) else model
        torch.save(plain.state_dict(), out / "model.pt")
        (out / "seconds.json").write_text(json.dumps(seconds))
    if dist.is_initialized():
        dist.destroy_process_group()


def main() -> None:
    """Reads its task from the environment, since torchrun starts it, too."""
    task = json.loads(os.environ["TRAINING_TASK"])
    setting, form = Setting(**task["setting"]), Form(**task["form"])
    one_process(setting, form, task["bf16"], Path(task["out"]))


if __name__ == "__main__":
    main()
