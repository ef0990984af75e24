"""Changes between stop and resume: the table in docs/resume.md is what happens to a run of 6 steps, stopped at step 3.

WRITE_RESUME=1 python -m pytest tests/launch/cli/test_resume_table.py     writes the table anew
"""

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from kilobatch.data.files import write_whole
from kilobatch.data.sources.convert import prepare
from kilobatch.data.sources.encoding import encoding_for_views
from kilobatch.launch.recipes.recipe import load_recipe
from kilobatch.launch.runs.identity import read_identity, write_identity
from tests.helpers.in_process_runs import (
    Ended,
    copy_of,
    kilobatch,
    same_bits,
    stop_at,
    train_tiny,
    weights,
    write_images,
)
from tests.helpers.own_cache import own_cache
from tests.helpers.process_groups import run_ranks

DOCUMENT = Path(__file__).parents[3] / "docs" / "resume.md"
HEAD = "| what changes | `resume RUN` alone | where it is meant | weights at the end |\n|---|---|---|---|\n"
# Part of what is printed -> what happens. The first that is there counts.
REFUSALS = {
    "--accept-changes": "refused, listed",
    "--data-root": "refused; names `--data-root`",
    "no checkpoint of": "refused: no checkpoint fits",
    "so that no checkpoint": "refused: other steps in an epoch",
    "other classes than data.train": "refused: labels do not match",
    "stays where it is": "refused; names `branch`",
    "has finished": "refused: nothing is left",
}
NOTES = {
    "changed from step": "recorded",
    "the learning rate at step": "the rate is said",
    "ends at once": "ends at once, said",
    "kilobatch: warning:": "a warning",
    ".npz, now ": "said",
    "job: 1": "queued",
}


MADE, BLOCKS = "made", "blocks"
# A network that has blocks to compute again. Its checkpoints are a thousand times as large, so there are two.
RESNET = ["encoder.name=resnet18", "encoder.width=null", "encoder.stem=cifar", "checkpoint.every_steps=3"]


@dataclass(frozen=True)
class Row:
    """A change. words: by which it is meant; alone: words that the plain command has, too; on_disk: changes files of a
    run's copy, None: recipe.yaml is edited to what the words say; bits: whether the weights are compared; of: the run's
    folder."""

    words: list[str] = field(default_factory=list)
    alone: list[str] | None = None
    on_disk: Callable[[Path], object] | None = None
    finished: bool = False
    bits: bool = True
    of: str = MADE


def option(*words: str, bits: bool = True, finished: bool = False) -> Row:
    return Row([*words], bits=bits, finished=finished)


def disk(change: Callable[[Path], object], *words: str, bits: bool = True) -> Row:
    return Row([*words], on_disk=change, bits=bits)


def command(*words: str, bits: bool = True) -> Row:
    return Row(alone=[*words], on_disk=lambda run: None, bits=bits)


def replace_in(file: str, old: str, new: str) -> Callable[[Path], object]:
    return lambda run: (run / file).write_text(re.sub(old, new, (run / file).read_text()))


def other_versions(run: Path) -> None:
    recorded = read_identity(run)
    assert recorded is not None
    write_identity(run, recorded.model_copy(update={"versions": {**recorded.versions, "torch": "1.0"}}))


def copied_beton(run: Path) -> None:
    """A .beton of the same images, with its note, that another recipe could have been trained with."""
    beton = prepare(f"npz:{run.parent}/train.npz", "train", encoding_for_views(8))
    for file in beton.parent.glob(f"{beton.name}*"):
        shutil.copy(file, run.parent / f"copy.beton{file.name.removeprefix(beton.name)}")


def as_a_job(run: Path) -> None:
    (run / "code" / "001").mkdir(parents=True)


def move_data(run: Path) -> None:
    (run.parent / "moved").mkdir()
    for name in ("train.npz", "test.npz"):
        (run.parent / name).rename(run.parent / "moved" / name)


def rename_classes(run: Path) -> None:
    for seed, name in enumerate(("train", "test")):
        write_images(run.parent / f"{name}.npz", seed, ("bird", "dog"))


ACCEPT = "--accept-changes"
ROWS: dict[str, Row] = {
    "nothing": command(),
    "`schedule.epochs`: more": option("schedule.epochs=5", bits=False),
    "`schedule.epochs`: more, of a run that has finished": option("schedule.epochs=5", finished=True, bits=False),
    "`schedule.epochs`: fewer than are done": option("schedule.epochs=1", bits=False),
    "`schedule.name`": option("schedule.name=constant"),
    "`optimizer.lr`": option("optimizer.lr=0.01"),
    "`optimizer.weight_decay`": option("optimizer.weight_decay=0.1"),
    "`optimizer.name`": option("optimizer.name=sgd"),
    "`data.batch`": option("data.batch=4"),
    "`data.order`: class-balanced": option("data.order.class_balanced=true"),
    "`data.order`: a long tail, which leaves fewer images": option("data.order.long_tailed.ratio=4"),
    "`optimizer.freeze`: a part": option("optimizer.freeze=[encoder.convs.0]"),
    "`encoder.checkpoint`, of a ResNet": Row(["encoder.checkpoint=true"], of=BLOCKS),
    "`method.temperature`": option("method.temperature=0.5"),
    "`method.dim`, of the projections": option("method.dim=16"),
    "`method.name`": option("method.name=moco"),
    "`encoder.name`": option("encoder.name=resnet18"),
    "`encoder.width`": option("encoder.width=4"),
    "`encoder.stem`": option("encoder.stem=cifar"),
    "`encoder.norm`, here with `engine.chunks=1`": option("encoder.norm=global", "engine.chunks=1"),
    "`run.seed`": option("seed=7"),
    "`data.views.size`": option("data.views.size=16"),
    "`data.views.crop`": option("data.views.crop={scale: [0.2, 1]}"),
    "`data.views.jitter`, its strength": option("data.views.jitter.brightness=0.8"),
    "`engine.precision`: bf16": option("engine.precision=bf16"),
    "`engine.precision`: fp16": option("engine.precision=fp16"),
    "`engine.zero`": option("engine.zero=1"),
    "`engine.chunks`": option("engine.chunks=1"),
    "`engine.keep`": option("engine.keep=0"),
    "`engine.clip`": option("engine.clip=0.1"),
    "`checkpoint.every_steps`, `checkpoint.keep_last`": option("checkpoint.every_steps=2", "checkpoint.keep_last=3"),
    "`evaluate.final`, `evaluate.every_epochs`": option("evaluate.final=[]", "evaluate.every_epochs=0"),
    "`evaluate.knn.k`": option("evaluate.knn.k=5"),
    "`run.log_every`": option("run.log_every=3"),
    "`run.stall_minutes`": option("run.stall_minutes=5"),
    "`run.requeue.crashes`": option("run.requeue.crashes=5"),
    "`run.name`": option("run.name=other"),
    "`data.threads` of the loader": option("data.threads=2"),
    "`data.labels.share`": option("data.labels.share=0.5"),
    "`data.test`: none": option("data.test=null"),
    "the data lie elsewhere (`--data-root`)": disk(move_data, "--data-root", "{folder}={folder}/moved"),
    "the training images are others": disk(lambda run: write_images(run.parent / "train.npz", 7), ACCEPT),
    "the test images are others": disk(lambda run: write_images(run.parent / "test.npz", 7), ACCEPT),
    "a class has another name": disk(rename_classes, ACCEPT),
    "a class has another name, in training images only": disk(
        lambda run: write_images(run.parent / "train.npz", 0, ("bird", "dog")), ACCEPT
    ),
    "`data.train` names a copied `.beton` of the same images": disk(copied_beton, "data.train={folder}/copy.beton"),
    "versions of torch and others": disk(other_versions),
    "the machine": disk(replace_in("state.json", '"host": "[^"]*"', '"host": "elsewhere"')),
    "the number of workers: `--workers 2`": command("--workers", "2", bits=False),
    "the place: `--cluster local --workers-per-node 2`": command(
        "--cluster", "local", "--workers-per-node", "2", bits=False
    ),
    "the code, of a job": Row(alone=["--cluster", "local"], on_disk=as_a_job, bits=False),
    "the checkpoint: `--from 2`": command("--from", "2"),
}  # fmt: skip


def told(ended: Ended, run: Path) -> str:
    """The outcome of a command, in the table's words."""
    if ended.code == 2:
        found = next((words for part, words in REFUSALS.items() if part in ended.printed), None)
        assert found, ended.printed
        assert not ended.starts, f"a worker was started and refused it: {ended.printed}"
        return found
    assert ended.code in (0, 130), ended.printed
    assert ended.starts or "job: 1" in ended.printed
    notes = [words for part, words in NOTES.items() if part in ended.printed]
    notes += ["with today's code"] if (run / "code" / "002").exists() else []
    return "; ".join(["goes on", *notes])


def observed(row: Row, folder: Path, runs: dict[str, tuple[Path, dict]]) -> tuple[str, str, str]:
    """The last three columns of a row. runs: the stopped run of each name, and the weights at its end."""
    made, final = runs[row.of]
    plain, alone = prepared(made, row, folder / "plain"), row.alone or []
    if row.on_disk is None:
        recipe, _ = load_recipe(plain / "recipe.yaml", [word for word in row.words if "=" in word])
        write_whole(plain / "recipe.yaml", [recipe.dump_yaml().encode()])
    before = written(plain)
    first = told(kilobatch("resume", str(plain), *alone), plain)
    assert not first.startswith("refused") or written(plain) == before
    run, second = plain, "—"
    if row.words:
        run = prepared(made, row, folder / "meant")
        before = written(run)
        words = [word.format(folder=run.parent) if "{folder}" in word else word for word in row.words]
        second = told(kilobatch("resume", str(run), *words), run)
        assert not second.startswith("refused") or written(run) == before
    if not row.bits or (second if row.words else first).startswith("refused"):
        return first, second, "—"
    return first, second, "the same bits" if same_bits(weights(run), final) else "others"


def prepared(made: Path, row: Row, folder: Path) -> Path:
    run = copy_of(made.parent / "whole" if row.finished else made, folder)
    if row.on_disk is not None:
        row.on_disk(run)
    return run


def written(run: Path) -> dict[str, bytes]:
    """What a refusal leaves as it was."""
    names = ("recipe.yaml", "identity.json", "state.json", "metrics.jsonl", "evaluation.json")
    found = {name: (run / name).read_bytes() for name in names if (run / name).exists()}
    return found | {path.name: b"" for path in (run / "checkpoints").iterdir()}


def observe(folder: Path) -> dict[str, tuple[str, str, str]]:
    os.environ["KILOBATCH_CACHE"] = own_cache(folder / "cache")
    runs: dict[str, tuple[Path, dict]] = {}
    for name, more in ((MADE, []), (BLOCKS, RESNET)):
        run = train_tiny(folder / name, "encoder.norm=local", "engine.chunks=2", *more)
        runs[name] = run, weights(run)
        if name == MADE:
            shutil.copytree(run, run.with_name("whole"))
        stop_at(run, 3)
    return {name: observed(row, folder / str(n), runs) for n, (name, row) in enumerate(ROWS.items())}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str, str]]:
    return run_ranks(1, observe, tmp_path_factory.mktemp("table"), timeout=400.0)[0]


def test_the_table_in_the_document_is_what_happens(table: dict[str, tuple[str, str, str]]):
    rows = HEAD + "".join(f"| {name} | {' | '.join(columns)} |\n" for name, columns in table.items())
    start, _, rest = DOCUMENT.read_text().partition(HEAD)
    end = rest[rest.index("\n\n") + 1 :]
    if os.environ.get("WRITE_RESUME"):
        DOCUMENT.write_text(start + rows + end)
    assert DOCUMENT.read_text() == start + rows + end
    assert len(table) >= 30


def test_a_run_that_was_stopped_has_the_bits_of_one_that_was_not(table: dict[str, tuple[str, str, str]]):
    assert table["nothing"] == ("goes on", "—", "the same bits")
