"""Wrong recipes, overrides, data sets, runs and arguments: each gives exit code 2 and one message with the cause and
the way out, and nothing is started or left behind."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.own_cache import own_cache

# by what is wrong: the arguments, and parts that the message must have
ARGUMENTS: dict[str, tuple[list[str], list[str]]] = {
    "unknown recipe": (["train", "dmeo"], ["'dmeo'", "did you mean 'demo'?"]),
    "missing recipe file": (["train", "my.yaml"], ["no recipe file my.yaml"]),
    "unknown key": (["train", "demo", "method.temprature=0.2"], ["temprature", "did you mean 'temperature'?"]),
    "unknown section": (["train", "demo", "optimzer.lr=1"], ["'optimzer'", "did you mean 'optimizer'?"]),
    "key without section": (["train", "demo", "lr=1"], ["'lr=1'", "did you mean 'optimizer.lr'"]),
    "unknown nested key": (["train", "demo", "data.views.jitter.hu=0.1"], ["'data.views.jitter'", "'hue'"]),
    "unknown method": (["train", "demo", "method.name=simclrr"], ["'simclrr'", "did you mean 'simclr'?"]),
    "a file that is no method": (["train", "demo", "method.name=losses"], ["'losses'", "simclr"]),
    "unknown encoder": (["train", "demo", "encoder.name=resnet19"], ["resnet19", "'resnet50'", "'resnet18'?"]),
    "temperature 0": (["train", "demo", "method.temperature=0"], ["method.temperature is 0", "greater than 0"]),
    "text for a number": (["train", "demo", "data.batch=many"], ["data.batch is many", "integer"]),
    "quoted number": (["train", "demo", "data.batch='478'"], ["data.batch is '478'", "integer"]),
    "true for a number": (["train", "demo", "data.batch=true"], ["data.batch is true", "integer"]),
    "half an image": (["train", "demo", "data.batch=4.5"], ["data.batch is 4.5", "integer"]),
    "infinite": (["train", "demo", "method.temperature=1e999"], ["method.temperature is inf", "finite"]),
    "probability of 2": (["train", "demo", "data.views.flip=2"], ["data.views.flip is 2", "less than or equal to 1"]),
    "backward range": (["train", "demo", "data.views.crop.scale=[1, 0.1]"], ["(1.0, 0.1)", "(0.1, 1.0)"]),
    "even blur kernel": (["train", "demo", "data.views.blur.kernel=4"], ["kernel 4", "use 5"]),
    "wrong precision": (["train", "demo", "engine.precision=fp23"], ["fp23", "did you mean 'fp32'?"]),
    "warm-up longer than training": (
        ["train", "demo", "schedule.warmup_epochs=2000"],
        ["override 'schedule.warmup_epochs=2000'", "configs/demo.yaml line", "2000", "use at most"],
    ),
    "batch does not divide over workers": (
        ["train", "demo", "data.batch=477", "--workers", "2"],
        ["477", "2 workers × 1 chunks", "use 476 or 478"],
    ),
    "batch does not divide over chunks": (
        ["train", "demo", "engine.chunks=4", "encoder.norm=local", "--workers", "2"],
        ["478", "2 workers × 4 chunks = 8", "use 472 or 480"],
    ),
    "fewer images than workers": (["train", "demo", "data.batch=2", "--workers", "4"], ["data.batch 2", "use 4"]),
    "data set smaller than a batch": (
        ["train", "demo", "data.batch=2000"],
        ["data.batch 2000", "1437 images", "use at most 1437"],
    ),
    "chunks neither a number nor auto": (
        ["train", "demo", "engine.chunks=many"],
        ["engine.chunks is many", "or 'auto'"],
    ),
    "more graphs kept than chunks": (
        ["train", "demo", "encoder.norm=local", "engine.chunks=2", "engine.keep=3"],
        ["keep 3 is more than chunks 2", "or auto"],
    ),
    "chunks under global norm": (["train", "demo", "engine.chunks=2"], ["engine.chunks 2", "encoder.norm=local"]),
    "more views than the method takes": (
        ["train", "demo", "data.views.count=3"],
        ["override 'data.views.count=3'", "simclr takes 2 views", "use 2"],
    ),
    "patches of a method without them": (
        ["train", "demo", "data.views.second.by_patch=true"],
        ["data.views.second.by_patch is true", "simclr makes no patches (these do: pirl)", "use false"],
    ),
    "one image to a batch": (["train", "demo", "data.batch=1"], ["data.batch 1", "use 2 or more"]),
    "fewer images than workers × chunks": (
        ["train", "demo", "data.train=npz:three.npz", "data.batch=4", "--workers", "4"],
        ["data.batch 4", "3 images", "4 is the least", "add images"],
    ),
    "linear batch does not divide": (
        ["train", "demo", "evaluate.final=[linear]", "evaluate.linear.batch=255", "--workers", "2"],
        ["override 'evaluate.linear.batch=255'", "evaluate.linear.batch 255", "2 workers", "use 254 or 256"],
    ),
    "linear batch larger than the data set": (
        ["train", "demo", "evaluate.final=[linear]", "evaluate.linear.batch=2000", "--workers", "2"],
        ["evaluate.linear.batch 2000", "1437 images", "use at most 1436"],
    ),
    "linear batch of eval does not divide": (
        ["eval", "demo-2", "--linear", "--workers", "239"],
        ["evaluate.linear.batch 256", "239 workers", "use 239 or 478"],
    ),
    "linear batch given to eval": (
        ["eval", "demo-2", "evaluate.linear.batch=255", "--linear", "--workers", "2"],
        ["override 'evaluate.linear.batch=255'", "use 254 or 256"],
    ),
    "eval of another network": (
        ["eval", "demo-2", "encoder.width=8", "--knn"],
        ["override 'encoder.width=8'", "section evaluate", "--test"],
    ),
    "nesterov without momentum": (
        ["train", "demo", "optimizer.name=sgd", "optimizer.nesterov=true", "optimizer.momentum=0"],
        ["nesterov true with momentum 0", "use momentum"],
    ),
    "no workers": (["train", "demo", "--workers", "0"], ["--workers is 0", "1 or more"]),
    "more neighbours than images": (
        ["train", "demo", "evaluate.knn.k=5000"],
        ["evaluate.knn.k 5000", "1437 images"],
    ),
    "unknown evaluator": (["train", "demo", "evaluate.final=[knnn]"], ["knnn", "did you mean 'knn'?"]),
    "section emptied": (["train", "demo", "method=null"], ["section 'method' is empty"]),
    "section replaced": (["train", "demo", "optimizer=adamw"], ["section 'optimizer' is adamw"]),
    "group replaced": (["train", "demo", "data.views=7"], ["data.views is 7", "count, size, crop"]),
    "key under a value": (["train", "demo", "data.batch.size=7"], ["data.batch is {size: 7}", "integer"]),
    "override without =": (["train", "demo", "optimizer.lr"], ["'optimizer.lr'", "section.key=value"]),
    "override without value": (["train", "demo", "data.test="], ["no value", "data.test=null"]),
    "override of nothing": (["train", "demo", "=3"], ["'=3'", "section.key=value"]),
    "override with broken YAML": (["train", "demo", "data.views.mean=[1, 2"], ["'data.views.mean=[1, 2'", "YAML"]),
    "extends as an override": (["train", "demo", "extends=demo"], ["no section 'extends'"]),
    "run name with a path": (["train", "demo", "run.name=../x"], ["'../x'", "run.folder"]),
    "missing .beton": (
        ["train", "demo", "data.train=my.beton"],
        ["'data.train=my.beton'", "my.beton does not exist"],
    ),
    "missing folder": (["train", "demo", "data.train=folder:photos"], ["folder:photos", "no such folder"]),
    "unknown source": (["train", "demo", "data.test=digit"], ["'digit'", "did you mean 'digits'?"]),
    "truncated .beton": (["train", "demo", "data.train=short.beton"], ["short.beton", "kilobatch convert"]),
    "foreign .beton": (["train", "demo", "data.test=foreign.beton"], ["foreign.beton is not a .beton"]),
    "broken npz": (["train", "demo", "data.train=npz:broken.npz"], ["broken.npz"]),
    "damaged .beton to verify": (["convert", "--verify", "short.beton"], ["short.beton"]),
    "convert without arguments": (["convert"], ["a source and a file to write"]),
    "convert and verify at once": (["convert", "digits", "--verify", "a.beton"], ["--verify FILE checks one file"]),
    "adopt and convert at once": (["convert", "digits", "--adopt", "a.beton"], ["--adopt FILE checks one file"]),
    "adopt and verify at once": (["convert", "--adopt", "a.beton", "--verify", "b.beton"], ["leave out --verify b.b"]),
    "adopt a missing file": (["convert", "--adopt", "none.beton"], ["none.beton does not exist"]),
    "adopt a truncated file": (["convert", "--adopt", "foreign.beton"], ["foreign.beton is not a .beton"]),
    "label without adopt": (
        ["convert", "digits", "d.beton", "--label-field", "x"],
        ["--label-field is x", "--adopt FILE --label-field"],
    ),
    "convert to a wrong name": (["convert", "digits", "digits.ffcv"], ["digits.ffcv", "digits.beton"]),
    "convert with quality 0": (["convert", "digits", "d.beton", "--quality", "0"], ["quality is 0", "1 to 100"]),
    "convert an unknown source": (["convert", "floder:x", "d.beton"], ["floder:x", "folder:PATH"]),
    "unknown run": (["resume", "demo-1"], ["no run 'demo-1'", "did you mean 'demo-2'?"]),
    "a folder that is no run": (["resume", "cache"], ["cache is not a run", "recipe.yaml"]),
    "evaluate nothing": (["eval", "demo-2", "evaluate.final=[]"], ["evaluate.final", "--knn", "--linear", "--moved"]),
    "evaluate as its recipe says": (["eval", "demo-2"], ["no checkpoint", "kilobatch resume"]),
    "evaluate without a checkpoint": (["eval", "demo-2", "--knn"], ["no checkpoint", "kilobatch resume"]),
    "resume with a damaged state": (["resume", "damaged"], ["state.json is damaged", "--workers"]),
    "resume on workers that do not divide": (["resume", "demo-2", "--workers", "4"], ["478", "4 workers"]),
    "resume from a step without a checkpoint": (
        ["resume", "demo-2", "--from", "7"],
        ["--from 7: runs/demo-2 has no checkpoint of this step; there are: none"],
    ),
    "resume what has finished": (["resume", "finished"], ["has finished", "kilobatch eval"]),
    "export without a checkpoint": (["export", "demo-2", "e.safetensors"], ["checkpoint"]),
    "export beside a folder of that name": (["export", "finished", "e.safetensors"], ["runs/finished holds no chec"]),
    "export to a wrong name": (["export", "demo-2", "e.pt"], ["e.pt", "safetensors"]),
    "verify an unknown method": (["verify", "simclrr"], ["simclrr", "did you mean 'simclr'?"]),
}


@pytest.fixture
def damaged_files_and_runs(tmp_path: Path) -> None:
    """Creates damaged data sets, and three runs: a new one, a finished one and one with a damaged state."""
    from kilobatch.launch.recipes import recipe
    from kilobatch.launch.runs import run_folder

    for name in ("cache", "finished"):  # the latter has the name of a run
        (tmp_path / name).mkdir()
    (tmp_path / "short.beton").write_bytes(b"\x02\x00\x00")
    (tmp_path / "foreign.beton").write_bytes(np.random.default_rng(0).bytes(5000))
    np.savez(tmp_path / "three.npz", images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3))
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    demo = recipe.resolve_recipe("demo", [])
    for name in ("demo-2", "finished", "damaged"):
        options = run_folder.RunOptions(name=name, folder=str(tmp_path / "runs"))
        run_folder.create_run(options, "demo", demo.dump_yaml(), workers=2)
    run_folder.set_status(tmp_path / "runs" / "finished", "finished", 2)
    (tmp_path / "runs" / "damaged" / "state.json").write_text('{"status": "runn')


@pytest.mark.parametrize("case", ARGUMENTS)
def test_refused(case: str, damaged_files_and_runs: None, kilobatch: Callable, tmp_path: Path):
    arguments, parts = ARGUMENTS[case]
    before = files(tmp_path)
    result = kilobatch(*arguments)
    assert_refused(result.code, result.err, parts)
    assert result.out == ""
    assert files(tmp_path) == before


def files(folder: Path) -> list[Path]:
    """All that lies there, but for numba's cache, which the first test of a process makes that loads numba."""
    found = [path.relative_to(folder) for path in folder.rglob("*")]
    return sorted(path for path in found if path != Path("cache") and path.parts[:2] != ("cache", "numba"))


def assert_refused(code: int, err: str, parts: list[str]) -> None:
    assert code == 2, err
    assert err.startswith("kilobatch: ")
    assert err.count("\n") == 1, "one message, on one line"
    assert "Traceback" not in err
    missing = [part for part in parts if part not in err]
    assert not missing, f"{missing} not in: {err}"


FILES: dict[str, tuple[str | bytes, list[str]]] = {
    "broken YAML": ("data:\n  batch: [1\n", ["my.yaml line", "not valid YAML"]),
    "a key twice": ("extends: demo\nrun:\n  seed: 1\n  seed: 2\n", ["line 4", "'seed' stands twice", "line 3"]),
    "a section twice": ("run:\n  seed: 1\nrun:\n  seed: 2\n", ["line 3", "'run' stands twice", "line 1"]),
    "empty": ("# nothing\n", ["my.yaml is empty", "extends"]),
    "a list": ("- data\n- method\n", ["my.yaml holds [data, method]"]),
    "a number for a key": ("extends: demo\n3: 4\n", ["line 2", "keys must be text"]),
    "an alias": ("extends: demo\nrun: &a {seed: 1}\ndata: *a\n", ["line 3", "aliases"]),
    "a Python object": ("extends: demo\nrun: {seed: !!python/object:os.system 1}\n", ["line 2"]),
    "a date with a tag": ("extends: demo\nrun: {name: !!timestamp 2026-01-01}\n", ["line 2", "2026-01-01", "plain"]),
    "not text": (b"data:\n  train: \xff\xfe\n", ["my.yaml is not a text file"]),
    "an unknown key": ("extends: demo\nrun:\n  sede: 1\n", ["my.yaml line 3", "'sede'", "did you mean 'seed'?"]),
    "a wrong value": ("extends: demo\ndata:\n  batch: -8\n", ["my.yaml line 3", "data.batch is -8", "greater than"]),
    "a wrong value in a list": ("extends: demo\ndata:\n  views:\n    mean: [0, 0, red]\n", ["line 4", "mean.2 is red"]),
    "no method": ("data: {batch: 2}\n", ["my.yaml", "method.name is missing", "simclr"]),
    "a section that is text": ("extends: demo\ndata: digits\n", ["line 2", "section 'data' is digits"]),
    "an empty section": ("extends: demo\ncheckpoint:\n", ["line 2", "section 'checkpoint' is empty"]),
    "extends nothing real": ("extends: simclr_cifra10\n", ["line 1", "did you mean 'simclr_cifar10'?"]),
    "extends a missing file": ("extends: other/base.yaml\n", ["line 1", "other/base.yaml"]),
    "extends two": ("extends: [demo, simclr_cifar10]\n", ["line 1", "one recipe"]),
    "extends itself": ("extends: my.yaml\n", ["line 1", "circle: my.yaml -> my.yaml"]),
}


@pytest.mark.parametrize("case", FILES)
def test_recipe_file_refused(case: str, kilobatch: Callable, tmp_path: Path):
    content, parts = FILES[case]
    (tmp_path / "my.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    result = kilobatch("train", "my.yaml")
    assert_refused(result.code, result.err, parts)


def test_a_circle_of_three(kilobatch: Callable, tmp_path: Path):
    for name, parent in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {parent}\n")
    assert_refused(2, kilobatch("train", "a.yaml").err, ["c.yaml line 1", "a.yaml -> b.yaml -> c.yaml -> a.yaml"])


def test_a_run_name_is_used_once(kilobatch: Callable, damaged_files_and_runs: None):
    result = kilobatch("train", "demo", "run.name=demo-2")
    assert_refused(
        result.code,
        result.err.replace(result.err[: result.err.index("kilobatch:")], ""),
        ["runs/demo-2", "another name"],
    )


@pytest.mark.parametrize("arguments", [["train"], ["train", "demo", "--wokrers", "2"], ["tarin", "demo"]])
def test_usage_errors(arguments: list[str], kilobatch: Callable):
    result = kilobatch(*arguments)
    assert result.code == 2
    assert result.err.startswith("kilobatch: ") and result.err.count("\n") == 1
    assert "Traceback" not in result.err


def test_as_a_process(tmp_path: Path):
    command = [sys.executable, "-m", "kilobatch", "train", "demo", "method.temperature=0"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert_refused(result.returncode, result.stderr, ["method.temperature is 0"])
    assert list(tmp_path.iterdir()) == []


def test_train_and_test_of_other_classes(kilobatch: Callable, tmp_path: Path):
    names = np.array(["0", "1", "ten"])
    np.savez(tmp_path / "three.npz", images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3), class_names=names)
    result = kilobatch("train", "demo", "data.test=npz:three.npz")
    message = result.err[result.err.index("kilobatch: ") :]  # the progress of the conversions comes before
    assert_refused(
        result.code, message, ["npz:/", "three.npz", "3 classes", "digits", "10", ": ten;", "data.test=null"]
    )
    assert not (tmp_path / "runs").exists()


def test_a_refusal_inside_the_workers(tmp_path: Path):
    """All checkpoints are damaged, which only the workers find out: one message names them all."""
    from kilobatch.launch.recipes import recipe
    from kilobatch.launch.runs import run_folder

    run = run_folder.create_run(
        run_folder.RunOptions(name="run", folder=str(tmp_path)),
        "demo",
        recipe.resolve_recipe("demo", []).dump_yaml(),
        workers=2,
    )
    for step in (3, 6):
        (run / "checkpoints" / f"step-{step:08d}").mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "kilobatch", "resume", str(run)],
        env=os.environ | {"KILOBATCH_CACHE": own_cache(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2, result.stdout + result.stderr
    output = result.stdout + result.stderr
    assert output.count("no whole checkpoint") == 1
    assert all(part in output for part in ("step-00000003", "step-00000006", "start the run anew"))
    assert "Traceback" not in output and "failed first" not in output
    assert run_folder.status(run) == "failed"
