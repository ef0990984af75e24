"""`kilobatch init`: the recipe that it writes for one's own images, and what it says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.specs import open_source
from kilobatch.launch.cli import choices
from kilobatch.launch.cli import init as init_command
from kilobatch.launch.cli.choices import Place, as_recipe, choose, contrasting_methods, recipe_to_extend
from kilobatch.launch.cli.survey import Survey, survey
from kilobatch.launch.recipes.checks import check
from kilobatch.launch.recipes.recipe import Recipe, read_recipe, resolve_recipe
from tests.helpers.transcripts import transcript
from tests.launch.conftest import CommandResult

CPU, GPU = Place("this machine", 1, cpu=True), Place("h100", 8, cpu=False)
DIGITS = """\
images: 1,437 of about 32 pixels, 10 classes (digits)
test images: 360 (digits)
wrote digits.yaml: simclr_cifar10 with convnet, views of 32 pixels, batch 256, 200 epochs of 5 steps
how long: kilobatch plan digits.yaml
next: kilobatch train digits.yaml run.name=first
"""


def photographs(folder: Path, side: int = 70, splits: tuple[str, ...] = ("train", "val"), classes: str = "ab") -> None:
    draws = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(12):
                pixels = draws.integers(0, 256, (side, side + 20, 3), np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")


def checked(file: Path, workers: int = 1) -> Recipe:
    """A recipe as `train` reads it, once the checks have passed it."""
    recipe, settings = read_recipe(str(file), [])
    check(recipe, workers, settings)
    return recipe


def test_what_is_said_and_written_of_digits(tmp_path: Path) -> None:
    assert transcript(tmp_path, "init", "digits", "--gpu", "cpu") == (0, DIGITS)
    recipe = checked(tmp_path / "digits.yaml")
    assert (recipe.encoder.name, recipe.data.batch, recipe.data.groups[0].size) == ("convnet", 256, 32)
    assert recipe.data.test == "digits" and recipe.evaluate.knn.k == 28
    assert [path.name for path in tmp_path.iterdir()] == ["digits.yaml"]  # no temporary file
    lines = (tmp_path / "digits.yaml").read_text().splitlines()
    options = [line for line in lines if ": " in line and not line.startswith("#")]
    assert len(options) >= 12 and all(" # " in line or previous.strip().startswith("#") for previous, line in
        zip(lines, lines[1:], strict=False) if line in options)  # fmt: skip


def test_a_folder_of_photographs(kilobatch: Callable[..., CommandResult], tmp_path: Path) -> None:
    """Its splits are found; a ResNet's step is fitted to the machine."""
    photographs(tmp_path / "my #1: photos")
    done = kilobatch("init", "folder:my #1: photos", "--gpu", "cpu")
    assert done.code == 0 and "24 of about 70 pixels, 2 classes" in done.out, done.out + done.err
    assert "finding what fits into the memory of this machine" in done.err  # it takes seconds
    recipe = checked(tmp_path / "my_1_photos.yaml")
    assert recipe.data.train == f"folder:{tmp_path}/my #1: photos/train"
    assert recipe.data.test == f"folder:{tmp_path}/my #1: photos/val"
    assert (recipe.encoder.name, recipe.data.groups[0].size, recipe.engine.precision) == ("resnet18", 64, "auto")
    assert recipe.data.batch == 8 and recipe.evaluate.knn.k == 5


def test_views_of_several_sizes_are_written_whole(kilobatch: Callable[..., CommandResult], tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    assert kilobatch("init", "folder:photos", "--method", "swav", "--gpu", "cpu", "--out", "s.yaml").code == 0
    shipped, recipe = resolve_recipe("swav_imagenet", []).data.groups, checked(tmp_path / "s.yaml")
    assert [(group.count, group.size) for group in recipe.data.groups] == [(2, 64), (6, 24)]
    sizes = [group.model_copy(update={"size": size}) for group, size in zip(shipped, (64, 24), strict=True)]
    assert list(recipe.data.groups) == sizes  # nothing but the sizes has changed


def test_where_test_images_are_found(tmp_path: Path) -> None:
    photographs(tmp_path / "one" / "deep", splits=("train",))
    photographs(tmp_path / "two", splits=("training", "test", "validation"))
    photographs(tmp_path / "three", splits=("train", "test"), classes="a")
    photographs(tmp_path / "four", splits=("train",))
    photographs(tmp_path / "four", splits=("test",), classes="abc")
    assert survey(f"folder:{tmp_path}/one/deep/train").test is None
    assert "nothing is scored" in survey(f"folder:{tmp_path}/one/deep/train").no_test
    assert survey(f"folder:{tmp_path}/two").test == f"folder:{tmp_path}/two/validation"
    assert survey(f"folder:{tmp_path}/two/training").test == f"folder:{tmp_path}/two/validation"
    assert "single class" in survey(f"folder:{tmp_path}/three").no_test
    assert "other classes" in survey(f"folder:{tmp_path}/four").no_test
    for split in ("train", "test"):
        convert(open_source(f"folder:{tmp_path}/two/{'training' if split == 'train' else split}", "train"),
                tmp_path / f"{split}.beton")  # fmt: skip
    assert survey(f"{tmp_path}/train.beton").test == f"{tmp_path}/test.beton"
    assert survey(f"{tmp_path}/test.beton").test is None
    x, y = np.zeros((9, 20, 16, 3), np.uint8), np.arange(9) % 3
    np.savez(tmp_path / "both.npz", x_train=x, y_train=y, x_test=x[:3], y_test=y[:3])
    np.savez(tmp_path / "train.npz", images=x, labels=y)
    assert survey(f"npz:{tmp_path}/both.npz") == Survey(
        f"npz:{tmp_path}/both.npz", f"npz:{tmp_path}/both.npz", 9, 3, 16, 3
    )
    assert survey(f"npz:{tmp_path}/train.npz").test is None


def test_images_without_labels_are_not_evaluated(kilobatch: Callable[..., CommandResult], tmp_path: Path) -> None:
    photographs(tmp_path / "plain", side=40, splits=("train", "test"), classes="a")
    (tmp_path / "plain/train/words.txt").write_text("text")
    done = kilobatch("init", "folder:plain", "--gpu", "cpu", "--out", "mine.yaml")
    assert "test images: none: images of a single class have no labels to evaluate by" in done.out
    assert "no labels" in done.out and checked(tmp_path / "mine.yaml").data.test is None
    assert "passed over: 1 not images (.txt)" in done.out
    (tmp_path / "plain/train/a").rename(tmp_path / "my holiday")
    done = kilobatch("init", "my holiday", "--gpu", "cpu")
    assert done.code == 0 and "12 of about 40 pixels, no labels" in done.out, done.out + done.err
    assert checked(tmp_path / "my_holiday.yaml").data.train == f"folder:{tmp_path}/my holiday"


def test_a_file_is_overwritten_by_force_alone(kilobatch: Callable[..., CommandResult], tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", images=np.zeros((20, 32, 32), np.uint8), labels=np.arange(20) % 2)
    (tmp_path / "some.yaml").write_text("mine")
    refused = kilobatch("init", "npz:some.npz", "--gpu", "cpu")
    said = "kilobatch: some.yaml exists; --force overwrites it, --out FILE.yaml writes another\n"
    assert (refused.code, refused.err) == (2, said) and (tmp_path / "some.yaml").read_text() == "mine"
    assert kilobatch("init", "npz:some.npz", "--gpu", "cpu", "--force").code == 0
    assert checked(tmp_path / "some.yaml").data.batch == 8


@pytest.mark.parametrize("side", [20, 60, 300])
@pytest.mark.parametrize("method", contrasting_methods())
def test_every_method_at_every_size(method: str, side: int) -> None:
    """1,437 images, on a CPU and on eight GPUs: the checks pass, and milestones, queues and banks fit the images."""
    for place in (CPU, GPU):
        name = recipe_to_extend(method, side)
        seen = Survey("digits", "digits", 1437, 360, side, 10)
        recipe, settings = as_recipe(choose(seen, place, name, resolve_recipe(name, []), None, 1))
        check(recipe, place.workers, settings)
        assert recipe.method.name == method and recipe.data.batch <= 1437 // 2
        assert getattr(getattr(recipe.method, "queue", None), "length", 0) <= 1437
        assert recipe.schedule.warmup_epochs <= recipe.schedule.epochs / 10
        assert all(0 < fall < recipe.schedule.epochs for fall in recipe.schedule.milestones)


def test_the_newest_recipe_of_a_method_is_extended() -> None:
    assert recipe_to_extend("moco", 224) == "moco_v2_imagenet" and recipe_to_extend("moco", 32) == "moco_v2_cifar10"
    assert recipe_to_extend("moco_v3", 224) == "moco_v3_imagenet"  # not the ViT's
    assert recipe_to_extend("simclr", 32) == "simclr_cifar10"


def test_rate_and_epochs_follow_the_batch_and_the_images() -> None:
    def chosen(method: str, images: int, batch: int, place: Place = GPU) -> choices.Choices:
        base = recipe_to_extend(method, 224)
        return choose(Survey("digits", None, images, 0, 224, 10), place, base, resolve_recipe(base, []), batch, 1)

    assert chosen("simclr", 50_000, 1024)["optimizer.lr"].value == 2.4  # 4.8 times the root of a quarter
    assert chosen("moco", 50_000, 128)["optimizer.lr"].value == 0.015  # half of 0.03
    assert chosen("simclr_v2", 50_000, 1024)["optimizer.lr"].value == 0.1  # scaled by the recipe's own rule
    assert chosen("simclr", 1_281_167, 4096)["schedule.epochs"].value == 100
    assert chosen("simclr", 51_200, 512)["schedule.epochs"].value == 200  # 20,000 steps
    assert chosen("simclr", 51_200, 512, CPU)["schedule.epochs"].value == 10
    assert chosen("simclr", 1_281_167, 4096)["encoder.name"].value == "resnet50"


def test_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is named, this one's GPUs, and its CPU."""
    monkeypatch.setattr(init_command, "gpu_memory", lambda: 2**34)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    machine, place = init_command._machine(None, None, None)
    assert (machine.memory, place) == (2**34, Place("a GPU of this machine", 2, cpu=False))
    assert init_command._machine("v100", 8, None)[1] == Place("v100", 8, cpu=False)
    assert init_command._machine("cpu", None, None)[1] == CPU
    plans = [init_command._plan_command(of, "a.yaml") for of in (CPU, place, Place("v100", 8, cpu=False))]
    own = "kilobatch plan a.yaml"
    assert plans == [own, f"{own} --gpus-per-node 2", f"{own} --gpu v100 --gpus-per-node 8"]
    monkeypatch.setattr(init_command, "gpu_memory", lambda: None)
    assert init_command._machine(None, None, 3)[1] == Place("this machine", 3, cpu=True)
    seen, base = Survey("digits", None, 1437, 0, 300, 10), "simclr_imagenet"
    chosen = choose(seen, Place("v100", 8, cpu=False), base, resolve_recipe(base, []), None, 1)
    assert chosen["engine.precision"].value == "fp16" and chosen["data.views.size"].value == 224


def test_the_batch_fits_into_memory(
    kilobatch: Callable[..., CommandResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(init_command.machine_memory, "most_per_worker", lambda workers: 200 * 2**20)
    assert kilobatch("init", "digits", "--gpu", "cpu").code == 0
    text = (tmp_path / "digits.yaml").read_text()
    recipe = checked(tmp_path / "digits.yaml")
    assert recipe.data.batch < 256 and "as large as fits into the memory of this machine" in text
    assert recipe.optimizer.lr == 1.0  # scaled by the batch, which the recipe does
    monkeypatch.setattr(init_command.machine_memory, "most_per_worker", lambda workers: 2**20)
    refused = kilobatch("init", "digits", "--gpu", "cpu", "--force")
    assert refused.code == 2 and "and this machine has" in refused.err
    assert (tmp_path / "digits.yaml").read_text() == text


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["digit"], "did you mean 'digits'?"),
        (["digits", "--method", "simclrv2"], "did you mean 'simclr_v2'?"),
        (["digits", "--method", "finetune"], "learns from labels"),
        (["digits", "--gpu", "h10"], "did you mean 'h100'?"),
        (["digits", "--gpu", "cpu", "--workers-per-node", "0"], "--workers-per-node is 0; it should be 1 or more"),
        (["digits", "--gpu", "cpu", "--gpus-per-node", "2"], "it trains on CPUs; use --workers-per-node 2"),
        (["digits", "--gpu", "v100", "--workers-per-node", "2"], "each GPU has one worker; use --gpus-per-node 2"),
        (["digits", "--gpu", "h100", "--gpus-per-node", "512"], "8 for each of 512 workers"),
        (["digits", "--out", "digits"], "a recipe is a .yaml file"),
        (["digits", "--out", "no/digits.yaml"], "there is no folder no"),
        (["folder:none"], "there is no such folder"),
    ],
)
def test_refusals(arguments: list[str], part: str, kilobatch: Callable[..., CommandResult], tmp_path: Path) -> None:
    refused = kilobatch("init", *arguments)
    assert refused.code == 2 and part in refused.err, refused.err
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("images", ["digits", "folder:photos"])
def test_the_recipe_trains_as_it_is(images: str, tmp_path: Path) -> None:
    photographs(tmp_path / "photos")
    file = f"{images.removeprefix('folder:')}.yaml"
    assert transcript(tmp_path, "init", images, "--gpu", "cpu")[0] == 0
    short = ["schedule.epochs=2", "schedule.warmup_epochs=1", "run.device=cpu", "run.name=r"]
    code, printed = transcript(tmp_path, "train", file, *short, "--workers", "1")
    assert code == 0 and "k-NN top-1" in printed and "fast linear top-1" in printed, printed
