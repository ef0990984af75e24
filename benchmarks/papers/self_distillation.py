"""Self-distillation at its recipes' rates: a student of its teacher's size, on digits that move, by LARS at tau 0.1.

    python -m benchmarks.papers.self_distillation
    python -m benchmarks.papers.self_distillation --seeds 1 --epochs 20

A small replica of simclr_v2_cifar10_selfdistill and simclr_v2_imagenet_selfdistill: their method, optimizer, scaled
rate and share of warm-up, a convolutional network and the demo's views. The teacher learns from all labels by AdamW.
Each student learns in four ways: with the classifier adapted by LARS or not, and with the teacher's part of the loss
times the square of the temperature, as the authors' notebook has it, or without that factor, as eq. 3 is printed.

The accuracies are those of the 360 test digits, each moved once. A loss that is not finite ends a training.
"""

import argparse
from collections.abc import Iterator, Sequence
from statistics import mean

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.data.loading.loader import Loader, LoaderWorker, PlainLoader
from kilobatch.data.sources.convert import prepare
from kilobatch.launch.recipes.recipe import Recipe, resolve_recipe
from kilobatch.methods.method import DataFacts, Tensors
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.papers.distill import Distill
from kilobatch.methods.papers.finetune import FineTune
from kilobatch.trainer.evaluate import classify
from kilobatch.trainer.evaluate.features import Represent, classifying
from kilobatch.trainer.evaluate.moved import Moved
from kilobatch.trainer.optim.optimizers import build_optimizer, scaled_lr
from kilobatch.trainer.optim.options import OptimizerOptions
from kilobatch.trainer.optim.schedules import ScheduleOptions, lr_at

RECIPES = ("simclr_v2_cifar10_selfdistill", "simclr_v2_imagenet_selfdistill")
BATCH, CLASSES = 238, 10
WORKER = LoaderWorker(rank=0, world=1, threads=1, device=torch.device("cpu"))
VIEWS = resolve_recipe("simclr_v2_digits_finetune", []).data.groups[0]


def digits(seed: int) -> Loader:
    """Moved training digits, one view each."""
    return Loader(prepare("digits", "train"), VIEWS, WORKER, batch=BATCH, seed=seed)


def accuracy(method: FineTune) -> float:
    """The share of moved test digits that the method's classifier finds right."""
    with classifying(method) as logits:
        return moved_accuracy(logits)


def moved_accuracy(logits: Represent) -> float:
    """The share of moved test digits whose largest logit is that of their class."""
    images = PlainLoader(prepare("digits", "test"), VIEWS.size, VIEWS.mean, VIEWS.std, WORKER, batch=256)
    return dict(classify.evaluate(logits, Moved(images, VIEWS.mean, VIEWS.std), "moved"))["moved/top1"]


def losses(
    method: FineTune, options: OptimizerOptions, lr: float, schedule: ScheduleOptions, seed: int
) -> Iterator[float]:
    """Trains; yields the loss of every step."""
    optimizer, step = build_optimizer(options, method.train(), BATCH), 0
    with digits(seed) as loader:
        for epoch in range(schedule.epochs):
            for batch in loader.epoch(epoch):
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(schedule, lr, step, loader.steps_per_epoch)
                loss = loss_of(method, batch)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                batch_norm.commit(method)
                step += 1
                yield loss.item()


def loss_of(method: FineTune, batch: Batch) -> Tensor:
    return method.loss(method.embed(batch), method.target(batch), batch)


def teacher_of(seed: int, epochs: int) -> FineTune:
    """A network that has learned from all labels."""
    torch.manual_seed(seed)
    method = FineTune(ConvNet(), layer=0)
    method.prepare(DataFacts(1437, CLASSES))
    options = OptimizerOptions(name="adamw", lr=0.003, weight_decay=0)
    for _ in losses(method, options, options.lr, ScheduleOptions(epochs=epochs, warmup_epochs=epochs / 20), seed):
        pass
    return method


class WithoutFactor(Distill):
    """Eq. 3 as it is printed."""

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        return super().loss(z, t, batch) / self.temperature**2


def student_of(teacher: FineTune, recipe: Recipe, seed: int, epochs: int, factor: bool, adapted: bool) -> list[float]:
    """Trains a student. Returns its accuracy, its first loss, its largest and its last; accuracy 0 where a loss was not
    finite."""
    torch.manual_seed(100 + seed)
    kind = Distill if factor else WithoutFactor
    options = recipe.method.model_dump(include={"temperature", "alpha"})
    student = kind(ConvNet(), teacher="teacher", **options)
    student.prepare(DataFacts(1437, CLASSES))
    student.load_pretrained(lambda reference: teacher, fresh=True)
    if not adapted:
        student.groups = lambda: FineTune.groups(student)
    share = recipe.schedule.warmup_epochs / recipe.schedule.epochs
    schedule = ScheduleOptions(epochs=epochs, warmup_epochs=share * epochs)
    lr, seen = scaled_lr(recipe.optimizer, recipe.data.batch), []
    for loss in losses(student, recipe.optimizer, lr, schedule, 100 + seed):
        seen.append(loss)
        if loss != loss or loss == float("inf"):
            return [0.0, seen[0], max(seen), loss]
    return [accuracy(student), seen[0], max(seen), seen[-1]]


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=80)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    teachers = [teacher_of(seed, arguments.epochs) for seed in range(arguments.seeds)]
    taught = [accuracy(teacher) for teacher in teachers]
    table = Table(title=f"teachers: {percent(taught)}", title_justify="left")
    for column in ("recipe", "tau^2", "classifier", "students", "worst gap", "mean gap", "first, largest, last loss"):
        table.add_column(column)
    for name in RECIPES:
        recipe = resolve_recipe(name, [])
        for factor in (True, False):
            for adapted in (False, True):
                found = [
                    student_of(teacher, recipe, seed, arguments.epochs, factor, adapted)
                    for seed, teacher in enumerate(teachers)
                ]
                gaps = [100 * (top - student[0]) for top, student in zip(taught, found, strict=True)]
                table.add_row(
                    f"{name}, lr {scaled_lr(recipe.optimizer, recipe.data.batch):g}",
                    "yes" if factor else "no",
                    "adapted" if adapted else "plain",
                    percent([student[0] for student in found]),
                    f"{max(gaps):+.1f}",
                    f"{mean(gaps):+.1f}",
                    ", ".join(f"{pick([s[k] for s in found]):.3g}" for k, pick in ((1, max), (2, max), (3, max))),
                )
    Console(emoji=False, width=160).print(table)


def percent(shares: Sequence[float]) -> str:
    return " ".join(f"{100 * share:.1f}" for share in shares)


if __name__ == "__main__":
    main()
