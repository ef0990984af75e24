"""Transcripts of each part of the program, as a user reads it: recorded in transcripts/*.txt, of 100 columns without a
terminal, and where they differ in a locale of ASCII alone and in 40 columns.

WRITE_TRANSCRIPTS=1 python -m pytest tests/launch/cli/test_transcripts.py     writes the recordings anew; read them
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from kilobatch.data.sources import progress_bar as conversion_progress
from kilobatch.launch.pipelines.results import conclude
from kilobatch.trainer import parity
from kilobatch.trainer.evaluate import picture
from kilobatch.trainer.monitor import progress_bar
from kilobatch.trainer.ranks import phase
from tests.helpers.pipeline_results import finished_pipeline
from tests.helpers.recordings import NARROW, SURROUNDINGS, Mask, Session, check_recording
from tests.launch.cli.test_all_mistakes import MINE


def padded(found: re.Match[str]) -> str:
    """What stands for a number in a column of a table, in the same room."""
    return ("N%" if found[0].endswith("%") else "N").rjust(len(found[0]))


# Numbers and names that depend on the machine.
RATES: list[Mask] = [(r"(loss|loss is about|far above) [\d.e+]+(?![^\s,])", r"\1 N"), (r"wait \d+%", "wait N%")]
RATES += [(r"\d[\d,]* images/s", "N images/s")]
RATES += [(r"\d:\d\d:\d\d to go", "0:00:00 to go"), (r" {2,}\d+\.\d+%", padded), (r"(?<!chance )\b\d+\.\d+%", "N%")]
STATUS: list[Mask] = [(r" +\d+, \d+[smh]\w* ago", lambda found: "4, 0s ago".rjust(len(found[0])))]
STATUS += [(r" {2,}\d[\d.]*(,\d{3})*(e\+\d+)?%?(?=\s|$)", padded)]
HASHES: list[Mask] = [(r"-[0-9a-f]{16}\.beton", "-HASH.beton")]
TINY = "data.train=npz:train.npz data.test=npz:test.npz data.batch=8 data.views.size=8 data.threads=1 encoder.width=2 "
TINY += "evaluate.knn.k=3 evaluate.every_epochs=1 evaluate.final=[knn] run.log_every=1 run.device=cpu"
Sessions = dict[str, Session]


def begin(folder: Path, *masks: Mask) -> Sessions:
    """A session in each of the surroundings, in a folder of its own. It has dark images and bright ones, of a class
    whose name is not ASCII: any encoder tells them apart; and test images that are all the same: none does."""
    draws = np.random.default_rng(0)
    train, test = (draws.integers(0, 40, (16, 16, 16, 3), np.uint8) for _ in range(2))
    train[1::2] += 200
    test[1::2] += 200
    common = {"labels": np.arange(16) % 2, "class_names": ["dark", "größer"]}
    sessions: Sessions = {}
    for letter, where in zip("abc", SURROUNDINGS, strict=True):
        (own := folder / letter / "photos").mkdir(parents=True)
        for name, images in {"train": train, "test": test, "same": np.zeros_like(test)}.items():
            np.savez(own / f"{name}.npz", images=images, **common)
        sessions[where] = Session(where, own, [*RATES, *HASHES, *masks])
    return sessions


def again(sessions: Sessions, *masks: Mask) -> Sessions:
    """Other sessions in the same folders."""
    return {where: replace(one, typed=[], masks=[*one.masks, *masks]) for where, one in sessions.items()}


class Clock:
    """Seconds for phase(): they pass by its calls alone, or not at all."""

    def __init__(self, step: float) -> None:
        self.step, self.now = step, 0.0

    def monotonic(self) -> float:
        self.now += self.step
        return self.now


@pytest.fixture(scope="module", autouse=True)
def unhurried() -> Iterator[None]:
    """Nothing takes so long that it is told how far it is, however slow the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phase, "time", Clock(0.0))
        for lines in (progress_bar, conversion_progress):
            patch.setattr(lines, "EVERY", float("inf"))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    """A run `r` in each of the surroundings, and what was read while it trained."""
    final = "evaluate.final=[knn,linear] evaluate.linear.epochs=2 evaluate.linear.batch=8"
    sessions = begin(tmp_path_factory.mktemp("trained"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress_bar, "EVERY", 0.0)  # a line for each step
        for session in sessions.values():
            session.command(f"train demo {TINY} {final} schedule.epochs=2 schedule.warmup_epochs=1 "
                            "checkpoint.every_steps=1 checkpoint.keep_last=9 run.name=r --workers 1")  # fmt: skip
    return sessions


def test_scores_and_their_baselines(trained: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("ROWS", "NEAREST", "QUERY_IMAGES"):
        monkeypatch.setattr(picture, size, 1)
    sessions = again(trained, *STATUS)
    for where, session in sessions.items():
        session.command("status", terminal=where == NARROW)
        session.command("eval r")
        session.command("eval r --moved --picture")
        with monkeypatch.context() as patch:
            patch.chdir(session.folder)
            conclude(finished_pipeline("mine"))
        replace(session, masks=[]).command("status mine", terminal=where == NARROW)
    check_recording("1-scores", sessions)


def test_phases_and_progress(trained: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = again(trained)
    monkeypatch.setattr(parity, "RANKS", (1,))  # the ranks of others are processes
    known = parity.standard
    monkeypatch.setattr(parity, "standard", lambda name: replace(known(name), constructions=()))
    for where, session in sessions.items():
        session.typed += trained[where].typed
        session.command("resume r")
        session.command("branch r second --from 2")
        session.command("resume second")
        session.command("convert npz:test.npz test.beton")
        session.command("convert --verify test.beton")
        with monkeypatch.context() as patch:
            patch.setattr(phase, "time", Clock(1.0))
            replace(session, masks=[(r"\b\de-\d\d fp", "Ne-NN fp")]).command("verify simclr")
    check_recording("2-progress", sessions)


def test_a_run_that_does_not_learn(tmp_path: Path) -> None:
    poor = f"{TINY.replace('npz:test', 'npz:same')} schedule.warmup_epochs=0"
    sessions = begin(tmp_path, *STATUS)
    for where, session in sessions.items():
        session.command(f'train demo {poor} schedule.epochs=4 "method={{name: finetune}}" data.views.count=1 '
                        '"optimizer={name: sgd, lr: 12, scaling: none}" run.name=bad --workers 1')  # fmt: skip
        session.command(f'train demo {poor} schedule.epochs=2 "method={{name: moco, queue: {{length: 16}}}}" '
                        "encoder.norm=local run.name=queue --workers 1")  # fmt: skip
        session.command("status queue", terminal=where == NARROW)
        narrowed = (r" {2,}", "  ")  # as wide as its loss is large
        replace(session, masks=[*session.masks, narrowed]).command("status bad")
    check_recording("3-not-learning", sessions)


def test_starting(tmp_path: Path) -> None:
    sessions = begin(tmp_path)
    for session in sessions.values():
        session.command("init npz:train.npz --gpu cpu")
        session.python("print(open('photos.yaml').read())")
        session.command("options data.views.crop")
        session.command("recipes")
        session.command("recipes simclr_v2_digits_distill")
    check_recording("4-starting", sessions)


REFUSED = [
    "train mine.yaml engine.b=2 optimizer.lr",
    "train demo data.views.count=3 data.batch=477 data.train=no.beton --workers 2",
    "train demo --workers two",
    "train demo --wokrers 2",
    "tarin demo",
    "train",
    "train demo data.train=folder:photos",
    "train demo data.train=npz:train.npz data.test=npz:dogs.npz data.batch=8 evaluate.knn.k=3",
    "train demo data.train=npz:train.npz",
    "resume nothing",
    "resume schedule.epochs=3",
    "status nothing",
    "submit demo --nodes 0 --gpus-per-node -1 --time soon",
    "plan demo --gpu A10",
    "verify simclrr",
    "bench --device tpu",
    "convert floder:x out.beton",
    "convert npz:train.npz out.ffcv",
    "embed nothing npz:test.npz out.npz",
    "export nothing out.safetensors",
]


def test_refusals(tmp_path: Path) -> None:
    sessions = begin(tmp_path)
    for session in sessions.values():
        (session.folder / "mine.yaml").write_text(MINE)
        pixels = np.zeros((16, 8, 8, 3), np.uint8)
        np.savez(
            session.folder / "dogs.npz", images=pixels, labels=np.arange(16) % 3, class_names=["Bär", "cat", "dög"]
        )
        for line in REFUSED:
            session.command(line)
    check_recording("5-refusals", sessions)


def test_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = begin(tmp_path)
    for session in sessions.values():
        monkeypatch.setattr(phase, "time", Clock(1.0))
        session.command("plan demo --gpu a100 --nodes 2")
    check_recording("6-plan", sessions)


def test_features(trained: Sessions) -> None:
    sessions = again(trained)
    for session in sessions.values():
        session.command("embed r npz:test.npz features.npz")
        session.command("embed r npz:test.npz features.npz")
        session.command("export r encoder.safetensors")
        session.command("embed encoder.safetensors npz:test.npz features.safetensors --split test")
        session.python("import numpy; {name: value.shape for name, value in numpy.load('features.npz').items()}")
    check_recording("7-features", sessions)


PYTHON = """\
import kilobatch
run = kilobatch.train("demo", workers=1, run__name="p", schedule__epochs=1, schedule__warmup_epochs=0, **tiny)
run, run.status, len(run.metrics())
sorted(run.evaluate("knn"))
network, preprocess = run.encoder()
preprocess
table = run.embed("npz:test.npz")
table.features.shape, table.names[:2], table.labels[:2], table.class_names
loader = kilobatch.ViewLoader("npz:train.npz", batch=8, views=kilobatch.Views(size=8))
[tuple(one.shape) for one, two in loader]
loader.close()
kilobatch.train("demo", method__temprature=1)
kilobatch.train("demo", optimizer__lr={1})
kilobatch.train("demo", data__batch=477, workers=2)
kilobatch.Run("nothing")
kilobatch.load_encoder("nothing.safetensors")
"""


def test_python(trained: Sessions) -> None:
    sessions = again(trained, ("known: p, r(, second)?", "known: p, r"))  # a test before may have made another
    for session in sessions.values():
        words = [word.partition("=") for word in TINY.split()]
        session.names["tiny"] = {name.replace(".", "__"): yaml.safe_load(value) for name, _, value in words}
        for line in PYTHON.splitlines():
            session.python(line)
    check_recording("8-python", sessions)
