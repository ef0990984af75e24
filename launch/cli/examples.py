"""Examples of each command, which its `--help` shows at the end."""

from collections.abc import Callable
from typing import Any

import typer

EXAMPLES = {
    "recipes": ["kilobatch recipes", "kilobatch recipes simclr_imagenet"],
    "init": ["kilobatch init photos", "kilobatch init train.beton --method moco --gpu a100 --out mine.yaml"],
    "options": ["kilobatch options", "kilobatch options optimizer"],
    "train": [
        "kilobatch train demo --workers 2",
        "kilobatch train simclr_cifar10 data.batch=512 optimizer.lr=0.6 --name first",
    ],
    "submit": [
        "kilobatch submit demo --cluster local",
        "kilobatch submit simclr_imagenet data.train=/data/train.beton data.test=/data/val.beton --nodes 4 "
        "--gpus-per-node 8 --time 24:00:00",
        "kilobatch submit demo --sweep optimizer.lr=0.3,0.6 --sweep seed=0,1 --cluster local",
    ],
    "pipeline": [
        "kilobatch pipeline simclr_v2_digits --workers 2",
        "kilobatch pipeline simclr_v2_cifar10 --labels 10% finetune.schedule.epochs=30",
    ],
    "resume": ["kilobatch resume first", "kilobatch resume first schedule.epochs=200"],
    "branch": ["kilobatch branch first second --from 4000 optimizer.lr=0.3"],
    "cancel": ["kilobatch cancel first"],
    "status": ["kilobatch status", "kilobatch status --watch"],
    "logs": ["kilobatch logs first --follow", "kilobatch logs first --rank 1 --lines 20"],
    "drill": ["kilobatch drill demo --cluster local"],
    "plan": [
        "kilobatch plan demo",
        "kilobatch plan simclr_imagenet --gpu a100 --nodes 4 --gpus-per-node 8 --images 1281167",
    ],
    "bench": ["kilobatch bench", "kilobatch bench --out here.json", "kilobatch bench demo data.batch=64"],
    "eval": ["kilobatch eval first --knn evaluate.knn.k=20", "kilobatch eval first --linear --test val.beton"],
    "embed": ["kilobatch embed first folder:photos features.npz", "kilobatch embed encoder.safetensors digits out.npz"],
    "convert": [
        "kilobatch convert folder:photos/train train.beton --max-side 512 --min-side 256",
        "kilobatch convert --verify train.beton",
    ],
    "export": ["kilobatch export first encoder.safetensors"],
    "weights": ["kilobatch weights moco_v2_800ep.pth.tar"],
    "import": ["kilobatch import model.ckpt-250228 r50_sk.safetensors"],
    "verify": ["kilobatch verify simclr", "kilobatch verify --all"],
    "new": ["kilobatch new method my_method"],
}


def with_examples(app: typer.Typer) -> Callable[..., None]:
    """Returns what adds a command to the application, under its function's name or another, with its examples."""

    def add(command: Callable[..., Any], name: str | None = None) -> None:
        lines = EXAMPLES.get(name or command.__name__, [])
        # typer makes a line of what stands between empty lines, and reads [ as the beginning of a style.
        epilog = "\n\n".join(["Examples:", *lines]).replace("[", "\\[") if lines else None
        app.command(name, epilog=epilog)(command)

    return add
