"""What a pipeline comes to: its networks, how large they are and how often they are right. Loads no torch but to count
parameters."""

import json
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from kilobatch.data.errors import Refusal
from kilobatch.data.files import write_whole
from kilobatch.data.loading.labels import count_labelled
from kilobatch.data.sources.specs import count, count_classes
from kilobatch.launch.pipelines import pipeline
from kilobatch.launch.recipes import recipe
from kilobatch.launch.recipes.recipe import Recipe

FILE = "pipeline.json"
NAMES = {"pretrain": "pre-trained", "finetune": "fine-tuned (teacher)", "distill": "student"}
SHOWN = {
    "knn/top1": "k-NN",
    "linear/top1": "linear",
    "fast_linear/top1": "fast linear",
    "moved/moved/trained": "k-NN, moved",
    "classify/top1": "top-1",
    "classify/top5": "top-5",
    "classify_moved/top1": "top-1, moved",
    "classify_moved/top5": "top-5, moved",
}


class Row(BaseModel):
    """A stage's network. parameters: of the encoder, and of what stands on it where the network classifies; labels: how
    many training images' labels it learned from, by itself or by its teacher, of `images`; values: shares in 0..1."""

    stage: str
    encoder: str
    parameters: int
    labels: int
    images: int
    values: dict[str, float]


def conclude(top: Path) -> None:
    """Writes a finished pipeline's table as pipeline.json, and prints it."""
    rows: list[Row] = []
    for stage in pipeline.folders(top):
        rows.append(_row(stage))
    write_whole(top / FILE, [json.dumps([row.model_dump() for row in rows], indent=1).encode(), b"\n"])
    show(rows)


def after(run: Path) -> None:
    """Concludes the pipeline whose last stage this run is, now that it has finished; else does nothing."""
    before, behind = pipeline.stages_around(run)
    if before and not behind:
        conclude(run.parent)


def read(top: Path) -> list[Row]:
    """The table's rows; none before the pipeline's end. Raises Refusal where the file is damaged."""
    path = top / FILE
    if not path.is_file():
        return []
    try:
        return TypeAdapter(list[Row]).validate_json(path.read_bytes())
    except ValidationError as error:
        raise Refusal(f"{path} is damaged ({error.errors()[0]['msg']}); remove it") from error


def show(rows: list[Row]) -> None:
    columns = [name for name in SHOWN if any(name in row.values for row in rows)]
    table = Table("network", "encoder", box=None, pad_edge=False, header_style="bold")
    for heading in ("parameters", "labels", *(SHOWN[name] for name in columns)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shares = [f"{row.values[name]:.1%}" if name in row.values else "–" for name in columns]
        labels = f"{row.labels:,} of {row.images:,}" if row.labels else "–"
        table.add_row(NAMES[row.stage], row.encoder, f"{row.parameters / 1e6:.3f} M", labels, *shares)
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)


def _row(run: Path) -> Row:
    chosen, _ = recipe.load(run / "recipe.yaml")
    data = chosen.data
    return Row(
        stage=run.name,
        encoder=_encoder(chosen),
        parameters=parameters(chosen),
        labels=0 if run.name == "pretrain" else count_labelled(data.train, data.labels),
        images=count(data.train, "train"),
        values=values(run),
    )


def _encoder(chosen: Recipe) -> str:
    encoder = chosen.encoder
    parts = [encoder.name, f"width {encoder.width}" if encoder.width else "", "SK" if encoder.sk_ratio else ""]
    return " ".join(filter(None, parts))


def parameters(chosen: Recipe) -> int:
    """Of the network that is kept: all that is needed for its classes, or, where it has none, for its features."""
    import torch

    from kilobatch.launch.worker.pretrained import build

    with torch.device("meta"):
        method = build(chosen, 1, count_classes(chosen.data.train, "train"))
    kept = method if method.classifies else method.encoder
    return sum(parameter.numel() for parameter in kept.parameters())


def values(run: Path) -> dict[str, float]:
    """The last answer of each evaluator, rather that of the training's end."""
    found: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        found |= {name.removeprefix("final/"): value for name, value in json.loads(line).items()}
    return {name: found[name] for name in SHOWN if name in found}
