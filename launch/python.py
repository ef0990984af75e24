"""Training, evaluating and embedding from Python: the same commands, with their results as values.

What loads torch is imported in the functions that need it.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from os import fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kilobatch.data.errors import UserError
from kilobatch.data.sources.specs import Split
from kilobatch.launch.cli import embed as embed_command
from kilobatch.launch.cli import train as train_command
from kilobatch.launch.recipes.continuation import Continuation
from kilobatch.launch.recipes.recipe import Recipe, load_recipe, read_recipe
from kilobatch.launch.runs import run_folder
from kilobatch.trainer.checkpoint.feature_file import FeatureTable, read_features
from kilobatch.trainer.monitor.metrics_file import read_metrics

if TYPE_CHECKING:
    from kilobatch.launch.worker.encoder import LoadedEncoder

Where = str | os.PathLike[str]


class Run:
    """A run that is there: its folder, and what is in it. run: the folder, or its name under runs/.

    Raises UserError where there is none.
    """

    def __init__(self, run: Where):
        self.folder = run_folder.find_run(fspath(run))

    def __repr__(self) -> str:
        return f"Run({fspath(self.folder)!r})"

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe: every option of every section."""
        return load_recipe(self.folder / "recipe.yaml")[0]

    @property
    def status(self) -> run_folder.Status:
        """new, queued, running, finished, failed, interrupted or cancelled."""
        return run_folder.status(self.folder)

    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl, from the first step to the last."""
        return list(read_metrics(self.folder / "metrics.jsonl"))

    def encoder(self) -> "LoadedEncoder":
        """The network and its preprocessing, of the newest checkpoint: see load_encoder."""
        from kilobatch.launch.worker.encoder import load_encoder

        return load_encoder(self.folder)

    def evaluate(self, *evaluators: str, **options: Any) -> dict[str, float]:
        """As the function evaluate."""
        return evaluate(self.folder, *evaluators, **options)

    def embed(self, source: str, out: Where | None = None, **options: Any) -> FeatureTable:
        """As the function embed."""
        return embed(self.folder, source, out, **options)

    def resume(self, *, workers: int | None = None, **changes: Any) -> "Run":
        """Goes on from the newest checkpoint, as `kilobatch resume` does. changes: as train takes them."""
        continuation = Continuation(tuple(overrides(changes)))
        _conclude(self.folder, train_command.resume(fspath(self.folder), workers, continuation))
        return self


def train(recipe: Where, *, workers: int | None = None, anyway: bool = False, **changes: Any) -> Run:
    """Trains a recipe, as `kilobatch train` does, in worker processes, and waits for the end.

        run = train("demo", workers=2, schedule__epochs=5, data__views={"size": 32})

    recipe: a recipe's name, or a YAML file; workers: None: one for each GPU, or one without a GPU; anyway: train
    although the plan says that it cannot fit into memory; changes: of the recipe, with two underscores for each dot:
    optimizer__lr=0.1 is optimizer.lr=0.1. A value may be a dict with several options of a section.
    Raises UserError where it is refused, RuntimeError where a worker fails, and KeyboardInterrupt where it is stopped.
    """
    given = overrides(changes)
    options = read_recipe(fspath(recipe), given)[0].run
    folder = run_folder.new_run_path(options, Path(recipe).stem)
    named = [*given, f"run.name={json.dumps(folder.name)}"]
    _conclude(folder, train_command.train(fspath(recipe), named, workers, anyway))
    return Run(folder)


def evaluate(
    run: Where,
    *evaluators: str,
    train: str | None = None,
    test: str | None = None,
    workers: int | None = None,
    **changes: Any,
) -> dict[str, float]:
    """Evaluates a run's newest checkpoint, as `kilobatch eval` does. Returns the values by name, such as `knn/top1`.

        evaluate("first", "knn", "linear", evaluate__knn__k=20)

    evaluators: knn, linear, fast_linear, moved, classify, classify_moved; train, test: images instead of the run's;
    workers: None: as many as trained; changes: of the section evaluate, as train takes them. Raises as train does.
    """
    folder = run_folder.find_run(fspath(run))
    images = {"train": train, "test": test}
    _conclude(folder, train_command.evaluate(fspath(folder), [*evaluators], overrides(changes), images, workers))
    line = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in line.items() if "/" in name}


def embed(
    encoder: Where,
    source: str,
    out: Where | None = None,
    *,
    split: Split = "train",
    workers: int | None = None,
    force: bool = False,
) -> FeatureTable:
    """The features of a source's images, as `kilobatch embed` computes them, in the source's order.

        table = embed("encoder.safetensors", "folder:photos", "photos.npz")

    encoder: a run, one of its checkpoints, or an exported file; source: a .beton, folder:PATH, npz:PATH, digits, …;
    out: the file to write; None: none is kept; split: of sources that have two; force: replaces a file that is there.
    Raises as train does.
    """
    with tempfile.TemporaryDirectory(prefix="kilobatch-") as folder:
        path = Path(folder, "features.safetensors") if out is None else Path(out)
        asked: dict[str, Any] = {"split": split, "workers": workers, "force": force, "kept": out is not None}
        code = embed_command.embed(fspath(encoder), source, path, **asked)
        _conclude(embed_command.parts_folder(path), code)
        return read_features(path)


def overrides(changes: Mapping[str, Any]) -> list[str]:
    """Changes as the command line has them: {"optimizer__lr": 0.1} -> ["optimizer.lr=0.1"]. Raises UserError for a
    value that no recipe can hold."""
    found: list[str] = []
    for name, value in changes.items():
        key = name.replace("__", ".")
        try:
            found.append(f"{key}={json.dumps(value, ensure_ascii=False, default=_plain)}")
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise UserError(f"{name} is a {kind}; use a number, text, True, False, None, a list or a dict") from None
    return found


def _plain(value: object) -> str:
    if isinstance(value, os.PathLike):
        return str(value)
    raise TypeError


def _conclude(folder: Path, code: int) -> None:
    """Raises for an exit code other than 0; the workers' own messages have been printed."""
    match code:
        case train_command.FINISHED:
            return
        case train_command.INTERRUPTED:
            raise KeyboardInterrupt
        case train_command.REFUSED:
            raise UserError(f"{folder}: refused by a worker; its message stands above")
        case _:
            raise RuntimeError(f"{folder}: a worker has failed; its message stands above")
