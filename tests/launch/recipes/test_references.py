"""References to other runs, and few labels: checked before anything starts, without torch."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes import checks, references
from kilobatch.launch.recipes.recipe import read_recipe, resolve_recipe
from kilobatch.launch.runs.identity import ReferenceIdentity
from kilobatch.trainer.checkpoint.description import sealed

FINETUNE = ["demo", "method.name=finetune", "data.views.count=1", "evaluate.during=classify"]
DIGITS = [str(digit) for digit in range(10)]
DISTILL = ["demo", "method.name=distill", "data.views.count=1", "evaluate.during=classify", "method.teacher=fine"]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Runs as they lie in runs/: pre, fine, young (without a checkpoint), half (not finished), and one of another
    encoder, of other images, and of other classes. Their checkpoints say what the test needs, if anything."""
    monkeypatch.chdir(tmp_path)
    run("pre", ["demo"])
    run("fine", [*FINETUNE, "method.start=gone"])
    run("young", ["demo"], steps=0)
    run("wide", ["demo", "encoder.width=32"])
    run("bright", [*FINETUNE, "data.views.mean=[0.4, 0.5, 0.5]"])
    run("seven", FINETUNE)
    describe("seven", 2, classes=7)
    for name, names in (("turned", DIGITS[::-1]), ("words", ["zero", *DIGITS[1:]]), ("ten", DIGITS)):
        run(name, FINETUNE)
        describe(name, 3, classes=10, class_names=names)
    run("half", FINETUNE)
    describe("half", 3, step=3, steps_per_epoch=2, recipe=short_recipe(), classes=10, class_names=DIGITS)
    turned = {"classes": "10", "class_names": json.dumps(DIGITS[::-1])}
    for name, recipe_, told in (
        ("alone", ["demo"], {"content": "encoder"}),
        ("six", FINETUNE, {"classes": "6"}),
        ("turned", FINETUNE, turned),
    ):
        text = resolve_recipe(recipe_[0], recipe_[1:]).model_dump_json()
        save_file({"x": np.zeros(1)}, f"{name}.safetensors", {"recipe": text, **told})
    return tmp_path


def test_shuffling_needs_several_workers() -> None:
    changes = ["method.name=moco", "method.shuffle=true", "encoder.norm=local"]
    recipe, settings = read_recipe("demo", changes)
    with pytest.raises(UserError, match=r"override 'method.shuffle=true': .* one worker has nobody .*use more workers"):
        checks.check(recipe, 1, settings)
    checks.check(recipe, 2, settings)
    checks.check(recipe, 1, settings, evaluators=["knn"])


def test_an_evaluation_is_held_to_what_it_uses() -> None:
    for changes, workers in ((["data.batch=32"], 3), (["engine.chunks=5"], 1), (["data.batch=4000"], 1)):
        recipe, settings = read_recipe("demo", ["encoder.norm=local", *changes])
        with pytest.raises(UserError, match="data.batch"):
            checks.check(recipe, workers, settings)
        checks.check(recipe, workers, settings, evaluators=["knn"])
    recipe, settings = read_recipe("demo", ["evaluate.linear.batch=256"])
    with pytest.raises(UserError, match="evaluate.linear.batch 256 does not divide over 3 workers"):
        checks.check(recipe, 3, settings, evaluators=["linear"])
    checks.check(recipe, 3, settings, evaluators=["fast_linear"])


def run(name: str, recipe_: list[str], steps: int = 3) -> None:
    path = Path("runs") / name
    (path / "checkpoints").mkdir(parents=True)
    (path / "recipe.yaml").write_text(resolve_recipe(recipe_[0], recipe_[1:]).dump_yaml())
    if steps:
        (path / "checkpoints" / f"step-{steps:08}").mkdir()


def short_recipe() -> dict[str, object]:
    """As a checkpoint holds it."""
    short = [*FINETUNE[1:], "schedule.epochs=4", "schedule.warmup_epochs=0"]
    return resolve_recipe(FINETUNE[0], short).model_dump(mode="json")


def describe(name: str, at: int, **meta: object) -> None:
    path = Path("runs") / name / "checkpoints" / f"step-{at:08}"
    path.mkdir(exist_ok=True)
    (path / "checkpoint.json").write_bytes(sealed({"meta": meta}))


def check(*arguments: str, **how: object) -> None:
    recipe, settings = read_recipe(arguments[0], list(arguments[1:]))
    checks.check(recipe, 2, settings, **how)  # pyright: ignore[reportArgumentType]


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
    "more layers than the start's head has": (
        [*FINETUNE, "method.start=pre", "method.layer=3"],
        ["override 'method.layer=3'", "method.layer is 3", "'pre' has 2 layers", "use method.layer=2 method.dim=128"],
    ),
    "its last layer as a hidden one": (
        [*FINETUNE, "method.start=pre", "method.layer=2"],
        ["layer 2 is the last", "projections of 128 dimensions", "method.dim=128 to keep it, or method.layer=1"],
    ),
    "layers of what kept fewer": (
        [*FINETUNE, "method.start=fine", "method.layer=2"],
        ["'fine' has 1 layers of a projection head; use method.layer=1"],
    ),
    "layers of an encoder alone": (
        [*FINETUNE, "method.start=alone.safetensors"],
        ["'alone.safetensors' has 0 layers", "use method.layer=0"],
    ),
    "a last layer of none": (
        [*FINETUNE, "method.layer=0", "method.dim=128"],
        ["override 'method.dim=128'", "method.dim is 128", "method.layer is 0", "leave method.dim out"],
    ),
    "a teacher of other classes": (
        [*DISTILL[:-1], "method.teacher=seven"],
        ["override 'method.teacher=seven'", "knows 7 classes, and data.train 'digits' has 10"],
    ),
    "a file that teaches other classes": (
        [*DISTILL[:-1], "method.teacher=six.safetensors"],
        ["'six.safetensors' knows 6 classes, and data.train 'digits' has 10"],
    ),
    "a teacher of the same classes in another order": (
        [*DISTILL[:-1], "method.teacher=turned"],
        [
            "override 'method.teacher=turned'",
            "'9' (class 0 of 10) there is '0' (class 0 of 10) here",
            "classes_by=place",
        ],
    ),
    "a teacher of classes with other names": (
        [*DISTILL[:-1], "method.teacher=words"],
        ["other classes than data.train 'digits'", "'zero' (class 0 of 10) there"],
    ),
    "a file that teaches them in another order": (
        [*DISTILL[:-1], "method.teacher=turned.safetensors"],
        ["'turned.safetensors' has other classes", "'9' (class 0 of 10) there"],
    ),
    "a start that has not finished": (
        [*FINETUNE, "method.start=half"],
        ["override 'method.start=half'", "it has not finished: its newest checkpoint is of step 3 of 8"]
        + ["kilobatch resume runs/half", "name it: runs/half/checkpoints/step-00000003"],
    ),
    "a teacher that has not finished": (
        [*DISTILL[:-1], "method.teacher=half"],
        ["override 'method.teacher=half'", "has not finished"],
    ),
    "an encoder alone as a teacher": (
        [*DISTILL[:-1], "method.teacher=alone.safetensors"],
        ["'alone.safetensors' holds an encoder alone", "no classifier to learn from", "kilobatch export --whole"],
    ),
    "a single class": ([*FINETUNE, "data.train=folder:one"], ["'folder:one' has a single class", "each class"]),
    "keys shuffled for global norms": (
        ["demo", "method.name=moco", "method.shuffle=true"],
        ["override 'method.shuffle=true'", "encoder.norm is 'global'", "encoder.norm=local or method.shuffle=false"],
    ),
    "and in chunks": (
        ["demo", "method.name=moco", "method.shuffle=true", "encoder.norm=local", "engine.chunks=2", "data.batch=400"],
        ["mixes the whole batch of all ranks, but engine.chunks is 2; use engine.chunks=1"],
    ),
    "more hard negatives than keys": (
        ["demo", "method.name=mochi", "method.queue.length=600", "method.hard=700"],
        ["override 'method.hard=700'", "700 is more than the 600 keys of method.queue.length"],
    ),
    "an empty share": ([*FINETUNE, "data.labels.share=0"], ["data.labels.share is 0", "greater than 0"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_starts(case: str, folder: Path) -> None:
    Path("notes.txt").write_text("an image\n")
    (Path("one") / "cats").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save("one/cats/1.png")
    Path("half.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    arguments, expected = REFUSED[case]
    with pytest.raises(UserError) as refused:
        check(*arguments)
    missing = [words for words in expected if words not in str(refused.value)]
    assert not missing, f"{refused.value}: lacks {missing}"


def test_recipes_that_fit_pass(folder: Path) -> None:
    check(*FINETUNE, "method.start=pre")
    check(*FINETUNE, "method.start=runs/pre/", "encoder.width=16", "encoder.norm=local")
    check(*DISTILL, "encoder.width=8")
    check(*DISTILL, f"method.start={folder / 'runs' / 'pre'}", "data.labels.share=0.05")
    check(*FINETUNE, "data.labels.share=0.05", "data.unlabelled=drop", "data.batch=72")
    check(*FINETUNE, "data.batch=2")
    check(*FINETUNE, "method.start=pre", "method.layer=2", "method.dim=128")
    check(*FINETUNE, "method.start=alone.safetensors", "method.layer=0")
    half = "runs/half/checkpoints/step-00000003"  # a checkpoint is meant as it is
    check(*FINETUNE, f"method.start={half}")
    check(*DISTILL[:-1], f"method.teacher={half}")
    check(*FINETUNE, "method.start=turned")  # whose classifier is left out
    check(*DISTILL[:-1], "method.teacher=ten")
    check(*DISTILL[:-1], "method.teacher=words", "method.classes_by=place")
    describe("half", 3, step=8, steps_per_epoch=2, recipe=short_recipe())
    check(*FINETUNE, "method.start=half")
    assert references.references(resolve_recipe("demo", ["method.name=mochi"])) == {}  # its `start` is a number


def test_awaited_runs_are_checked_by_their_recipes(folder: Path) -> None:
    awaited = {"/later/pre": resolve_recipe("demo", ["encoder.width=32"]), "/later/fine": resolve_recipe("demo", [])}
    check(*FINETUNE, "method.start=/later/pre", "encoder.width=32", awaited=awaited)
    with pytest.raises(UserError, match=r"encoder.width 32 there, 16 here"):
        check(*FINETUNE, "method.start=/later/pre", awaited=awaited)
    with pytest.raises(UserError, match=r"'/later/pre' has 2 layers of a projection head"):
        check(*FINETUNE, "method.start=/later/pre", "encoder.width=32", "method.layer=4", awaited=awaited)
    with pytest.raises(UserError, match=r"'/later/fine' was trained by simclr"):
        check(*DISTILL, "method.teacher=/later/fine", awaited=awaited)


def test_references_of_a_run_that_has_begun_are_not_looked_for(folder: Path) -> None:
    fine = folder / "runs" / "fine"
    assert references.begun(fine) and not references.begun(folder / "runs" / "young")
    check(*FINETUNE, "method.start=gone", begun=True)
    check(*FINETUNE, "method.start=gone", evaluators=["classify"])
    with pytest.raises(UserError, match="'gone'"):
        check(*FINETUNE, "method.start=gone")


def test_submitted_recipes_name_absolute_places(folder: Path) -> None:
    from kilobatch.launch.recipes.data import with_absolute_paths

    (folder / "runs" / "pre").rename(folder / "pre")
    (folder / "fine").mkdir()  # a folder of this name that is no run
    recipe = resolve_recipe("demo", [*DISTILL[1:], "method.start=pre", "data.labels.list=some.txt"])
    rooted = with_absolute_paths(recipe)
    places = references.references(rooted)
    assert places == {"method.start": str(folder / "pre"), "method.teacher": str(folder / "runs" / "fine")}
    assert rooted.data.labels.list == str(folder / "some.txt")


def test_a_file_with_other_metadata_than_written_is_refused(folder: Path) -> None:
    text = resolve_recipe(FINETUNE[0], FINETUNE[1:]).model_dump_json()
    for name, value in (
        ("class_names", "[1]"),
        ("classes", "ten"),
        ("step", "-"),
        ("recipe", "[]"),
        ("recipe", text[:9]),
    ):
        save_file({"x": np.zeros(1)}, "odd.safetensors", {"recipe": text, name: value})
        with pytest.raises(UserError, match=f"odd.safetensors is damaged .*its {name} is not as it was written"):
            check(*DISTILL[:-1], "method.teacher=odd.safetensors")


def test_the_worker_compares_what_it_loads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run may have been trained on between the check and the start."""
    recipe = resolve_recipe("demo", [*DISTILL[1:], "method.start=pre"])
    found = ReferenceIdentity(path=folder / "runs" / "fine", step=3, sha256="0", classes=DIGITS[::-1])
    with pytest.raises(UserError, match=r"method.teacher 'fine' has other classes .*'9' .* there is '0'"):
        references.refuse_other_teacher(recipe, DIGITS, "fine", found)
    references.refuse_other_teacher(recipe, DIGITS[::-1], "fine", found)
    references.refuse_other_teacher(recipe, DIGITS, "pre", found)
    assert capsys.readouterr().err == ""
    references.refuse_other_teacher(recipe, DIGITS, "fine", found.model_copy(update={"classes": None}))
    assert "only their number was compared" in capsys.readouterr().err
