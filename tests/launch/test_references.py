"""What a recipe takes from other runs, and few labels: checked before anything starts, without torch."""

from pathlib import Path

import pytest

from data.refusal import Refusal
from launch import checks, recipe, references

FINETUNE = ["demo", "method.name=finetune", "data.views.count=1", "evaluate.during=classify"]
DISTILL = ["demo", "method.name=distill", "data.views.count=1", "evaluate.during=classify", "method.teacher=fine"]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Runs as they lie in runs/: pre, fine, young (without a checkpoint), and one of another encoder and of other
    images. Their checkpoints are empty folders: nothing here looks into one."""
    monkeypatch.chdir(tmp_path)
    run("pre", ["demo"])
    run("fine", [*FINETUNE, "method.start=gone"])
    run("young", ["demo"], steps=0)
    run("wide", ["demo", "encoder.width=32"])
    run("bright", [*FINETUNE, "data.views.mean=[0.4, 0.5, 0.5]"])
    return tmp_path


def run(name: str, recipe_: list[str], steps: int = 3) -> None:
    path = Path("runs") / name
    (path / "checkpoints").mkdir(parents=True)
    (path / "recipe.yaml").write_text(recipe.resolve(recipe_[0], recipe_[1:]).dump_yaml())
    if steps:
        (path / "checkpoints" / f"step-{steps:08}").mkdir()


def check(*asked: str, **how: object) -> None:
    chosen, settings = recipe.read(asked[0], list(asked[1:]))
    checks.check(chosen, 2, settings, **how)  # pyright: ignore[reportArgumentType]


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "no such run": ([*FINETUNE, "method.start=pree"], ["method.start 'pree'", "did you mean 'pre'?"]),
    "no checkpoint": ([*FINETUNE, "method.start=young"], ["no checkpoint yet", "kilobatch resume"]),
    "another encoder": (
        [*FINETUNE, "method.start=runs/wide"],
        ["override 'method.start=runs/wide'", "encoder.width 32 there, 16 here"],
    ),
    "a student's start of another encoder": (
        [*DISTILL, "method.start=pre", "encoder.width=8"],
        ["encoder.width 16 there, 8 here"],
    ),
    "a teacher without classifier": (
        [*DISTILL, "method.teacher=pre"],
        ["'pre' was trained by simclr", "no classifier", "fine-tune it first"],
    ),
    "a teacher of other pixels": ([*DISTILL, "method.teacher=bright"], ["mean [0.4, 0.5, 0.5]", "[0.5, 0.5, 0.5]"]),
    "another kind of file": (
        [*FINETUNE, "method.start=notes.txt"],
        ["notes.txt is no .safetensors", "kilobatch export"],
    ),
    "half a file": ([*FINETUNE, "method.start=half.safetensors"], ["half.safetensors is no whole .safetensors file"]),
    "a classifier where there is none": (
        ["demo", "evaluate.final=[knn, classify_moved]"],
        ["evaluate.final asks for classify_moved", "simclr has no classifier", "distill, finetune"],
    ),
    "and while training": (["demo", "evaluate.during=classify"], ["evaluate.during asks for classify"]),
    "unlabelled images for fine-tuning": (
        [*FINETUNE, "data.labels.share=0.1", "data.batch=64"],
        ["override", "data.unlabelled is keep", "finetune learns from labels alone", "1293 of 1437", "=drop"],
    ),
    "a batch of more than the labelled": (
        [*FINETUNE, "data.labels.share=0.05", "data.unlabelled=drop", "data.batch=74"],
        ["data.batch 74", "72 labelled images (data.unlabelled is drop)", "use at most 72"],
    ),
    "a list for images without names": (
        [*FINETUNE, "data.labels.list=notes.txt"],
        ["override 'data.labels.list=notes.txt'", "'digits' have no names", "data.labels.share"],
    ),
    "an empty share": ([*FINETUNE, "data.labels.share=0"], ["data.labels.share is 0", "greater than 0"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_starts(case: str, folder: Path) -> None:
    Path("notes.txt").write_text("an image\n")
    Path("half.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    asked, held = REFUSED[case]
    with pytest.raises(Refusal) as refused:
        check(*asked)
    missing = [words for words in held if words not in str(refused.value)]
    assert not missing, f"{refused.value}: lacks {missing}"


def test_what_fits_passes(folder: Path) -> None:
    check(*FINETUNE, "method.start=pre")
    check(*FINETUNE, "method.start=runs/pre/", "encoder.width=16", "encoder.norm=local")
    check(*DISTILL, "encoder.width=8")
    check(*DISTILL, f"method.start={folder / 'runs' / 'pre'}", "data.labels.share=0.05")
    check(*FINETUNE, "data.labels.share=0.05", "data.unlabelled=drop", "data.batch=72")
    check(*FINETUNE, "data.batch=2")
    assert references.references(recipe.resolve("demo", ["method.name=mochi"])) == {}  # its `start` is a number


def test_awaited_runs_are_held_to_their_recipes(folder: Path) -> None:
    awaited = {"/later/pre": recipe.resolve("demo", ["encoder.width=32"]), "/later/fine": recipe.resolve("demo", [])}
    check(*FINETUNE, "method.start=/later/pre", "encoder.width=32", awaited=awaited)
    with pytest.raises(Refusal, match=r"encoder.width 32 there, 16 here"):
        check(*FINETUNE, "method.start=/later/pre", awaited=awaited)
    with pytest.raises(Refusal, match=r"'/later/fine' was trained by simclr"):
        check(*DISTILL, "method.teacher=/later/fine", awaited=awaited)


def test_a_run_that_has_begun_looks_for_nothing(folder: Path) -> None:
    fine = folder / "runs" / "fine"
    assert references.begun(fine) and not references.begun(folder / "runs" / "young")
    check(*FINETUNE, "method.start=gone", begun=True)
    check(*FINETUNE, "method.start=gone", evaluators=["classify"])
    with pytest.raises(Refusal, match="'gone'"):
        check(*FINETUNE, "method.start=gone")


def test_submitted_recipes_name_absolute_places(folder: Path) -> None:
    from launch.submitting import with_absolute_paths

    (folder / "runs" / "pre").rename(folder / "pre")
    chosen = recipe.resolve("demo", [*DISTILL[1:], "method.start=pre", "data.labels.list=some.txt"])
    rooted = with_absolute_paths(chosen)
    places = references.references(rooted)
    assert places == {"start": str(folder / "pre"), "teacher": str(folder / "runs" / "fine")}
    assert rooted.data.labels.list == str(folder / "some.txt")
