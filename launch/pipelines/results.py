"""Results of a pipeline: the size and the accuracy of each stage's network, in pipeline.json and as a table. Loads no
torch, except to count parameters."""

import json
from pathlib import Path

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from kilobatch.data.files import read_model, write_whole
from kilobatch.data.loading.labels import count_labelled
from kilobatch.data.sources.specs import count_classes, count_images
from kilobatch.launch.pipelines.pipeline import stage_folders, stages_around
from kilobatch.launch.recipes.recipe import Recipe, load_recipe
from kilobatch.launch.runs.table_printing import print_table

FILE = "pipeline.json"
NAMES = {"pretrain": "pre-trained", "finetune": "fine-tuned (teacher)", "distill": "student"}
COLUMNS = {
    "knn/top1": "k-NN",
    "linear/top1": "linear",
    "fast_linear/top1": "fast linear",
    "moved/moved/trained": "k-NN, moved",
    "classify/top1": "top-1",
    "classify/top5": "top-5",
    "classify_moved/top1": "top-1, moved",
    "classify_moved/top5": "top-5, moved",
}


class StageRow(BaseModel):
    """The results of a stage's network.

    parameters: of the encoder and, where the network classifies, of its classifier too; labels: of how many of the
    `images` it used the labels, by itself or through its teacher; values: accuracies, from 0 to 1.
    """

    stage: str
    encoder: str
    parameters: int
    labels: int
    images: int
    values: dict[str, float]


def conclude(top: Path) -> None:
    """Writes a finished pipeline's results to pipeline.json, and prints them."""
    rows = [_row(stage) for stage in stage_folders(top)]
    write_whole(top / FILE, [json.dumps([row.model_dump() for row in rows], indent=1).encode(), b"\n"])
    print_results(rows)


def conclude_after_last_stage(run: Path) -> None:
    """Concludes the pipeline of a run that has finished, where the run is its last stage; else does nothing."""
    before, after = stages_around(run)
    if before and not after:
        conclude(run.parent)


def read_results(top: Path) -> list[StageRow]:
    """The rows of pipeline.json; none before the pipeline has finished. Raises UserError where the file is damaged."""
    path = top / FILE
    if not path.is_file():
        return []
    return read_model(path, list[StageRow], "remove it")


def print_results(rows: list[StageRow]) -> None:
    columns = [name for name in COLUMNS if any(name in row.values for row in rows)]
    table = Table("network", "encoder", box=None, pad_edge=False, header_style="bold")
    for heading in ("parameters", "labels", *(COLUMNS[name] for name in columns)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        accuracies = [f"{row.values[name]:.1%}" if name in row.values else "–" for name in columns]
        labels = f"{row.labels:,} of {row.images:,}" if row.labels else "–"
        table.add_row(NAMES[row.stage], row.encoder, f"{row.parameters / 1e6:.3f} M", labels, *accuracies)
    console = Console(emoji=False)
    print_table(table, console if console.is_terminal else Console(width=200, emoji=False))


def _row(run: Path) -> StageRow:
    recipe, _ = load_recipe(run / "recipe.yaml")
    data = recipe.data
    return StageRow(
        stage=run.name,
        encoder=_encoder(recipe),
        parameters=count_parameters(recipe),
        labels=0 if run.name == "pretrain" else count_labelled(data.train, data.labels),
        images=count_images(data.train, "train"),
        values=final_values(run),
    )


def _encoder(recipe: Recipe) -> str:
    encoder = recipe.encoder
    parts = [encoder.name, f"width {encoder.width}" if encoder.width else "", "SK" if encoder.sk_ratio else ""]
    return " ".join(filter(None, parts))


def count_parameters(recipe: Recipe) -> int:
    """Parameters of the network that is kept: of all of it where it classifies, else of its encoder."""
    import torch

    from kilobatch.launch.worker.pretrained import build_of_recipe

    with torch.device("meta"):
        method = build_of_recipe(recipe, 1, count_classes(recipe.data.train, "train"))
    kept = method if method.classifies else method.encoder
    return sum(parameter.numel() for parameter in kept.parameters())


def final_values(run: Path) -> dict[str, float]:
    """The last value of each evaluator in metrics.jsonl, where those of the training's end (final/…) come last."""
    found: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text("utf-8").splitlines():
        found |= {name.removeprefix("final/"): value for name, value in json.loads(line).items()}
    return {name: found[name] for name in COLUMNS if name in found}
