"""Students of a timm network with classes, and of an encoder without classes, on digits that move; several seeds.

    python -m benchmarks.papers.teachers
    python -m benchmarks.papers.teachers --seeds 1 --out FILE

What the file `--out` has is not trained again, so that a stopped benchmark goes on.

With classes: timm's resnet18 learns the digits from all labels in a plain loop of torch, and its state dict is all that
is kept of it. `simclr_v2_digits_distill` takes that file as its teacher; its student, an encoder of 37 thousand
parameters, sees no label. The accuracies are those of the classifiers on the 360 test digits, each moved once.

Without classes: `demo` trains an encoder by SimCLR, and `seed_digits` teaches its exported file to one of half the
width, by similarities to a queue, and by its features. The accuracies are those of k-NN on the moved test digits.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

import kilobatch
from benchmarks.papers.self_distillation import digits, moved_accuracy, percent
from kilobatch.launch.runs.final_evaluation import read_final_evaluation
from kilobatch.trainer.optim.schedules import ScheduleOptions, lr_at

NAME = "resnet18"
WORKERS = 2


def timm_teacher(file: Path, seed: int, epochs: int) -> float:
    """Trains timm's network by AdamW on moved digits, writes its weights, and returns its accuracy."""
    torch.manual_seed(seed)
    network = timm.create_model(NAME, num_classes=10).train()
    schedule, lr = ScheduleOptions(epochs=epochs, warmup_epochs=epochs / 20), 0.001
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.05)
    with digits(seed) as loader:
        for step, batch in enumerate(batch for epoch in range(epochs) for batch in loader.epoch(epoch)):
            for group in optimizer.param_groups:
                group["lr"] = lr_at(schedule, lr, step, loader.steps_per_epoch)
            F.cross_entropy(network(batch.views[0][:, 0]), batch.label).backward()
            optimizer.step()
            optimizer.zero_grad()
    save_file({name: x.contiguous() for name, x in network.state_dict().items()}, file)
    network.eval()
    return moved_accuracy(torch.no_grad()(lambda batch: network(batch.views[0][:, 0])))


def train(recipe: str, folder: Path, name: str, seed: int, part: str, value: str, **changes: Any) -> float:
    """Trains by the command's own function. Returns a value of the final evaluation."""
    where: dict[str, Any] = {
        "run__name": name,
        "run__folder": str(folder),
        "run__seed": seed,
        "evaluate__every_epochs": 0,
    }
    run = kilobatch.train(recipe, workers=WORKERS, **where, **changes)
    found = read_final_evaluation(run.folder)
    assert found, f"{run.folder} has no evaluation"
    return found.parts[part].logged[value]


def of_timm(folder: Path, seed: int, epochs: int) -> list[float]:
    """The accuracies of a teacher and its student."""
    file = folder / f"timm-{seed}.safetensors"
    taught = timm_teacher(file, seed, epochs)
    changes = {"method__teacher": str(file), "method__teacher_network": f"timm/{NAME}"}
    part, value = "classify_moved", "final/classify_moved/top1"
    return [taught, train("simclr_v2_digits_distill", folder, f"timm-{seed}", seed, part, value, **changes)]


def of_encoder(folder: Path, seed: int) -> list[float]:
    """The accuracies of a teacher without classes, of a student by similarity, and of one by features."""
    part, value = "moved", "final/moved/moved/trained"
    found = [train("demo", folder, f"demo-{seed}", seed, part, value)]
    for by in ("similarity", "features"):
        changes = {"method__teacher": str(folder / f"demo-{seed}"), "method__by": by}
        found.append(train("seed_digits", folder, f"{by}-{seed}", seed, part, value, **changes))
    return found


def rows(teacher: str, students: Sequence[str], found: list[list[float]]) -> list[list[str]]:
    taught, *others = zip(*found, strict=True)
    return [
        [
            teacher,
            percent(taught),
            student,
            percent(values),
            f"{100 * mean(a - b for a, b in zip(taught, values, strict=True)):+.1f}",
            f"{100 * max(a - b for a, b in zip(taught, values, strict=True)):+.1f}",
        ]
        for student, values in zip(students, others, strict=True)
    ]


def found_in(out: Path, settings: dict[str, int]) -> dict[tuple[str, int], list[float]]:
    """The accuracies that the file has of these settings, by teacher and seed."""
    lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return {(line["teacher"], line["seed"]): line["found"] for line in lines if settings.items() <= line.items()}


def main() -> None:
    """Trains what is missing, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40, help="of the timm network")
    parser.add_argument("--out", type=Path, default=Path("teachers.jsonl"), help="a line for each teacher and seed")
    options = parser.parse_args()
    torch.set_num_threads(1)  # more would wait for each other on a busy machine
    teachers: dict[str, Callable[[Path, int], list[float]]] = {
        NAME: lambda folder, seed: of_timm(folder, seed, options.epochs),
        "demo": of_encoder,
    }
    settings = {"epochs": options.epochs}
    for seed in range(options.seeds):
        for teacher, accuracies in teachers.items():
            if (teacher, seed) not in found_in(options.out, settings):
                with tempfile.TemporaryDirectory() as folder:
                    line = {"teacher": teacher, "seed": seed, "found": accuracies(Path(folder), seed), **settings}
                with options.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    found = found_in(options.out, settings)
    timms, encoders = ([found[teacher, seed] for seed in range(options.seeds)] for teacher in teachers)
    table = Table("teacher", "its top-1, %", "student", "top-1, %", "mean gap", "largest gap")
    for row in [
        *rows(f"timm/{NAME}, with classes", ["distill"], timms),
        *rows("demo, without classes", ["seed, by similarity", "seed, by features"], encoders),
    ]:
        table.add_row(*row)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
