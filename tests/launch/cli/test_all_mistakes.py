"""All mistakes of a recipe are told at once, each on a line with the place where it was written."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kilobatch.data.errors import Mistakes, UserError
from tests.launch.cli.test_surroundings import ASCII

MINE = """extends: demo
data:
  batch: many
method:
  temprature: 1
encoder:
  name: renet50
"""
TOLD = """kilobatch: 5 mistakes:
  override 'optimizer.lr' is not of the form section.key=value, such as optimizer.lr=4.8
  my.yaml line 5: 'method' has no key 'temprature'; did you mean 'temperature'?
  override 'engine.b=2': 'engine' has no key 'b'; known: adversarial, chunks, clip, clip_by, compile, \
keep, precision, zero
  my.yaml line 3: data.batch is many; it should be a valid integer
  my.yaml line 7: encoder.name is renet50; it should be 'resnet18', 'resnet34', 'resnet50', 'resnet101', \
'resnet152', 'vit_small', 'vit_base', 'convnet', timm/NAME, torchvision/NAME or FILE.py:function; \
did you mean 'resnet50'?
"""


def test_values_keys_and_overrides(kilobatch: Callable, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(MINE)
    result = kilobatch("train", "my.yaml", "engine.b=2", "optimizer.lr")
    assert (result.code, result.out, result.err) == (2, "", TOLD)


def test_in_a_narrow_locale_of_ascii_without_a_terminal(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(MINE)
    command = [sys.executable, "-m", "kilobatch", "train", "my.yaml", "engine.b=2", "optimizer.lr"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | ASCII, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr.decode("ascii")) == (2, b"", TOLD)


def test_an_unknown_method_hides_no_other_section(kilobatch: Callable) -> None:
    lines = kilobatch(
        "train", "demo", "method.name=simclrr", "method.a=1", "optimizer=3", "run.sede=1"
    ).err.splitlines()
    assert lines[0] == "kilobatch: 3 mistakes:" and len(lines) == 4
    assert lines[1] == "  override 'optimizer=3': section 'optimizer' is 3; it holds keys, or is left out"
    assert "there is no method 'simclrr'; did you mean 'simclr'? known: " in lines[2]
    assert lines[3] == "  override 'run.sede=1': 'run' has no key 'sede'; did you mean 'seed'?"


def test_parts_that_do_not_fit(kilobatch: Callable) -> None:
    changes = ["data.views.count=3", "data.batch=477", "engine.chunks=3", "data.train=no.beton", "data.test=digit"]
    lines = kilobatch("train", "demo", *changes, "--workers", "2").err.splitlines()
    assert lines[0] == "kilobatch: 5 mistakes:"
    starts = ["data.views.count=3", "data.batch=477", "engine.chunks=3", "data.train=no.beton", "data.test=digit"]
    assert [line.partition("'")[2].partition("'")[0] for line in lines[1:]] == starts
    assert "use 474 or 480" in lines[2] and "no.beton does not exist" in lines[4] and "'digits'" in lines[5]


def test_evaluators_that_do_not_fit(kilobatch: Callable) -> None:
    changes = ["evaluate.final=[knn,linear]", "evaluate.during=classify", "evaluate.every_epochs=1"]
    result = kilobatch("train", "demo", *changes, "evaluate.knn.k=5000", "evaluate.linear.batch=2000")
    assert result.err.startswith("kilobatch: 3 mistakes:\n  override 'evaluate.during=classify': ")
    assert "knn.k 5000 is more" in result.err and "use at most 1437" in result.err


def test_what_follows_from_a_mistake_is_not_told_as_another(kilobatch: Callable, tmp_path: Path) -> None:
    """Three images are too few for a batch of 4, and so for 20 neighbours."""
    np.savez(tmp_path / "three.npz", images=np.zeros((3, 8, 8, 3), np.uint8), labels=np.arange(3))
    result = kilobatch("train", "demo", "data.train=npz:three.npz", "data.batch=4")
    assert result.err.count("\n") == 1 and "more than the 3 images" in result.err


def test_resources(kilobatch: Callable) -> None:
    result = kilobatch("submit", "demo", "--nodes", "0", "--gpus-per-node", "-1", "--time", "1:00:00")
    assert result.err.startswith("kilobatch: 2 mistakes:\n  --nodes: ") and "\n  --gpus-per-node: " in result.err


def test_mistakes_within_mistakes_are_one_list() -> None:
    inner, outer = Mistakes(), Mistakes()
    for message in ("a", "b", "a"):
        inner.add(message)
    outer.add("b")
    with outer.noted():
        inner.refuse()
    try:
        outer.refuse()
    except UserError as error:
        assert str(error) == "2 mistakes:\n  b\n  a"
