"""Results of a pipeline: the size and the accuracy of each stage's network, in pipeline.json and as a table. Loads no
torch, except to count parameters."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from kilobatch.data.files import read_model, write_whole
from kilobatch.data.loading.labels import count_labelled, count_used
from kilobatch.data.sources.specs import count_classes
from kilobatch.launch.pipelines.pipeline import StageName, stage_folders
from kilobatch.launch.recipes.recipe import Recipe, load_recipe
from kilobatch.launch.runs.table_printing import print_table
from kilobatch.trainer.evaluate.baselines.baselines_file import Baselines, read_baselines
from kilobatch.trainer.monitor.metrics_file import read_metrics

FILE = "pipeline.json"
UNKNOWN, MARK = "–", "*"
NAMES = {"pretrain": "pre-trained", "finetune": "fine-tuned (teacher)", "distill": "student", "scratch": "from scratch"}
COLUMNS = {
    "knn/top1": "k-NN",
    "knn_sample/top1": "k-NN, sample",
    "linear/top1": "linear",
    "fast_linear/top1": "fast linear",
    "moved/moved/trained": "k-NN, moved",
    "classify/top1": "top-1",
    "classify/top5": "top-5",
    "classify_moved/top1": "top-1, moved",
    "classify_moved/top5": "top-5, moved",
}
ALL_LABELS = ("knn/top1", "knn_sample/top1", "linear/top1", "fast_linear/top1", "moved/moved/trained")
BASELINES = {"pixels": "raw pixels", "untrained": "untrained encoder", "chance": "chance"}


class StageRow(BaseModel):
    """The results of a stage's network.

    parameters: of the encoder and, where the network classifies, of its classifier too; labels: of how many of the
    `images` it used the labels, by itself or through its teacher; values: accuracies, from 0 to 1; baselines: those of
    raw pixels, of the untrained encoder and of guessing, by the columns that they stand in; knn: the settings and
    images of their k-NN, in words.
    """

    stage: StageName
    encoder: str
    parameters: int
    labels: int
    images: int
    values: dict[str, float]
    baselines: dict[str, dict[str, float]] = {}
    knn: str = ""


def conclude(top: Path) -> None:
    """Writes a finished pipeline's results to pipeline.json, and prints them."""
    rows = [_row(stage) for stage in stage_folders(top)]
    write_whole(top / FILE, [json.dumps([row.model_dump() for row in rows], indent=1).encode(), b"\n"])
    print_results(rows)


def conclude_after_last_stage(run: Path) -> None:
    """Concludes the pipeline of a run that has finished, where the run is its last stage; else does nothing."""
    stages = stage_folders(run.parent)
    if stages and stages[-1].name == run.name:
        conclude(run.parent)


def read_results(top: Path) -> list[StageRow]:
    """The rows of pipeline.json; none before the pipeline has finished. Raises UserError where the file is damaged."""
    path = top / FILE
    if not path.is_file():
        return []
    return read_model(path, list[StageRow], f"remove it; kilobatch resume {top} writes it anew")


def print_results(rows: list[StageRow]) -> None:
    """Prints the table: the stages, then what their figures are to be compared with."""
    shown = {name for row in rows for values in (row.values, *row.baselines.values()) for name in values}
    columns = [name for name in COLUMNS if name in shown]
    table = Table("network", "encoder", box=None, pad_edge=False, header_style="bold")
    for heading in ("parameters", "labels", *(COLUMNS[name] for name in columns)):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        labels = f"{row.labels:,} of {row.images:,}" if row.labels else UNKNOWN
        size = f"{row.parameters / 1e6:.3f} M"
        table.add_row(NAMES[row.stage], row.encoder, size, labels, *_cells(row.values, columns))
    for cells in _baseline_rows(rows, columns):
        table.add_row(*cells)
    console = Console(emoji=False)
    console = console if console.is_terminal else Console(width=200, emoji=False)
    print_table(table, console)
    if any(name in shown for name in ALL_LABELS):
        of_all = f"{MARK} with the labels of all {rows[0].images:,} training images, however many the network saw"
        console.print(of_all, highlight=False)
    for knn in dict.fromkeys(row.knn for row in rows if row.knn):
        console.print(f"raw pixels, untrained encoder: k-NN ({knn})", highlight=False)


def _cells(values: Mapping[str, float], columns: Sequence[str]) -> Iterator[str]:
    for name in columns:
        mark = MARK if name in ALL_LABELS else ""
        yield f"{values[name]:.1%}{mark}" if name in values else UNKNOWN


def _baseline_rows(rows: list[StageRow], columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The cells of each baseline; stages whose baselines are the same have one row of them."""
    for name, heading in BASELINES.items():
        merged: list[tuple[str, dict[str, float]]] = []
        for row in rows:
            encoder, values = row.encoder if name == "untrained" else "", row.baselines.get(name, {})
            same = (known for of, known in merged if of == encoder and known.items() >= _shared(known, values))
            if (known := next(same, None)) is not None:
                known |= values
            elif values:
                merged.append((encoder, dict(values)))
        for encoder, values in merged:
            cells = _cells(values, columns)
            yield heading, encoder, "", "", *(cell.rstrip(MARK) if name == "chance" else cell for cell in cells)


def _shared(known: Mapping[str, float], values: Mapping[str, float]) -> set[tuple[str, float]]:
    """The values whose names are known, with their names."""
    return {(name, value) for name, value in values.items() if name in known}


def _row(run: Path) -> StageRow:
    recipe, _ = load_recipe(run / "recipe.yaml")
    data, values = recipe.data, _last_values(run)
    baselines = read_baselines(run)
    return StageRow(
        stage=cast(StageName, run.name),
        encoder=_encoder(recipe),
        parameters=count_parameters(recipe),
        labels=0 if run.name == "pretrain" else count_labelled(data.train, data.labels, data.order),
        images=count_used(data.train, data.order),
        values={name: values[name] for name in COLUMNS if name in values},
        baselines=_baselines(values, baselines) if baselines else {},
        knn=baselines.model_copy(update={"labels": None}).conditions() if baselines else "",
    )


def _baselines(values: Mapping[str, float], found: Baselines) -> dict[str, dict[str, float]]:
    """The baselines by the columns that they stand in. values: all that the run has logged last, by name."""
    knn = "knn_sample/top1" if found.sampled else "knn/top1"
    rows = {"pixels": {knn: found.pixels}, "untrained": {knn: found.untrained}}
    for name, row in rows.items():
        if (moved := values.get(f"moved/moved/{name}")) is not None:
            row["moved/moved/trained"] = moved
    guessed = [name for name in COLUMNS if name in values and not name.endswith("/top5")]
    return {**rows, "chance": dict.fromkeys([knn, *guessed], found.chance)}


def _encoder(recipe: Recipe) -> str:
    encoder = recipe.encoder
    parts = [encoder.name, f"width {encoder.width}" if encoder.width else "", "SK" if encoder.sk_ratio else ""]
    return " ".join(filter(None, parts))


def count_parameters(recipe: Recipe) -> int:
    """Parameters of the network that is kept: of all of it where it classifies, else of its encoder."""
    import torch

    from kilobatch.launch.worker.pretrained import build_of_recipe
    from kilobatch.methods.method import DataFacts

    with torch.device("meta"):
        method = build_of_recipe(recipe, DataFacts(1, count_classes(recipe.data.train, "train")))
    kept = method if method.classifies else method.kept_encoder
    return sum(parameter.numel() for parameter in kept.parameters())


def final_values(run: Path) -> dict[str, float]:
    """The last value of each evaluator in metrics.jsonl, where those of the training's end (final/…) come last; none
    for a run that has lost the file."""
    found = _last_values(run)
    return {name: found[name] for name in COLUMNS if name in found}


def _last_values(run: Path) -> dict[str, float]:
    found: dict[str, float] = {}
    for line in read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else ():
        found |= {name.removeprefix("final/"): value for name, value in line.items() if isinstance(value, int | float)}
    return found
