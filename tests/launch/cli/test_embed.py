"""`kilobatch embed`: the features are the evaluators' own, on any number of workers; a killed one goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kilobatch as package
from kilobatch.data.beton import verify_beton
from kilobatch.data.loading.loader import LoaderWorker, PlainLoader
from kilobatch.data.sources.convert import prepare
from kilobatch.data.sources.encoding import encoding_for_views
from kilobatch.launch.cli import embed as command
from kilobatch.launch.processes import launcher
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.recipes.references import metadata_of, recipe_of
from kilobatch.launch.worker import embedding
from kilobatch.launch.worker.encoder import load_encoder
from kilobatch.launch.worker.pretrained import load_method, resolve_reference
from kilobatch.launch.worker.process_group import World
from kilobatch.methods import collectives
from kilobatch.trainer.checkpoint.export import export
from kilobatch.trainer.checkpoint.feature_file import FeatureTable, read_features
from kilobatch.trainer.checkpoint.feature_parts import EmbeddingWork, part_path
from kilobatch.trainer.evaluate.features import extract, representing
from tests.helpers.loaders import CPU, photo
from tests.helpers.method_runs import make_run
from tests.helpers.process_groups import run_ranks

ENCODERS = {
    "convnet": ["encoder.width=2"],
    "resnet": ["encoder={name: resnet18, stem: imagenet}"],
    "vit": ["encoder={name: vit_small}"],
    "fine-tuned": ["encoder.width=2", "method.name=finetune", "data.views.count=1"],
}
SIZE = ["data.views.size=32", "data.threads=1", "run.device=cpu"]
IMAGES = 70  # two parts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each encoder and its exported file, and images in a .npz."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    for name, changes in ENCODERS.items():
        make_run(folder / name, [*changes, *SIZE], 7, random=False)
        export(folder / name, folder / f"{name}.safetensors", whole=name == "fine-tuned", report=pytest.fail)
    pixels = np.stack([np.asarray(photo(i, 40, 40)) for i in range(IMAGES)])
    np.savez(folder / "images.npz", images=pixels, labels=np.arange(IMAGES) % 10)
    return folder


def work_of(made: Path, where: Path, source: str, out: Path) -> EmbeddingWork:
    found, beton = resolve_reference(str(where)), prepare(source, "train", encoding_for_views(32))
    info = verify_beton(beton)
    sums = {"encoder_sha256": found.sha256, "images_sha256": info.sha256, "samples": info.samples}
    return EmbeddingWork(encoder=found.path, beton=beton, device="cpu", stall_minutes=None, out=out, **sums)


def compute_all(folder: str, works: dict[str, EmbeddingWork]) -> None:
    world = World(collectives.rank(), collectives.world_size(), collectives.rank(), collectives.world_size(), CPU)
    for name, work in works.items():
        Path(folder, name).mkdir(exist_ok=True)
        embedding.compute_missing(Path(folder, name), work, world)


def features_in(folder: Path, work: EmbeddingWork) -> np.ndarray:
    assert missing(work, folder) == []
    return np.concatenate([work.read(folder, part) for part in range(work.parts)])


def test_the_same_features_by_every_way(made: Path, tmp_path: Path) -> None:
    """`embed` on one and on two workers, load_encoder with each image by itself, and the trainer's evaluator."""
    source = f"npz:{made}/images.npz"
    works = {name: work_of(made, made / f"{name}.safetensors", source, tmp_path / "out.npz") for name in ENCODERS}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        run_ranks(ranks, compute_all, str(tmp_path / str(ranks)), works)
    pixels = np.load(made / "images.npz")["images"]
    for name, work in works.items():
        one, two = (features_in(tmp_path / ranks / name, work) for ranks in ("1", "2"))
        assert np.array_equal(one, two) and one.std() > 0.01, name
        views = recipe_of(str(made / name)).data.groups[0]
        images = PlainLoader(work.beton, 32, views.mean, views.std, LoaderWorker(0, 1, 1, CPU), batch=256)
        with representing(load_method(str(made / name))) as represent:
            evaluators = extract(represent, images)
        network, preprocess = load_encoder(made / f"{name}.safetensors")
        assert not any(parameter.requires_grad for parameter in network.parameters())
        by_hand = torch.cat([network(preprocess(image)[None]) for image in pixels[::10]])
        for mine, other in ((one, evaluators.x), (one[::10], by_hand)):
            assert (torch.from_numpy(mine) - other).abs().max() < 1e-6 * max(1, float(other.abs().max())), name


def missing(work: EmbeddingWork, folder: Path) -> list[int]:
    work.discard_damaged(folder)
    return work.missing(folder)


def in_process(
    folder: Path, workers: int, module: str, arguments: list[str], stall_minutes: float | None = None
) -> RunOutcome:
    """Stands for launcher.run_workers with one worker."""
    assert module == embedding.__name__
    work = EmbeddingWork.model_validate_json(arguments[1])
    embedding.compute_missing(Path(arguments[0]), work, World(0, 1, 0, 1, CPU))
    return RunOutcome("finished")


def embed(monkeypatch: pytest.MonkeyPatch, where: Path, source: str, out: Path, **options: Any) -> FeatureTable:
    """The command in this process."""
    monkeypatch.setattr(launcher, "run_workers", in_process)
    given: dict[str, Any] = {"split": "train", "workers": 1, "force": False}
    assert command.embed(str(where), source, out, **{**given, **options}) == 0
    return read_features(out)


@pytest.mark.parametrize("suffix", ["npz", "safetensors", "parquet"])
def test_order_names_and_labels_are_the_sources(
    suffix: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    names = ["b/2.png", "b/ü.png", "a/9.png", "a/x/1.jpg"]
    for i, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        photo(i, 40, 40).save(tmp_path / "in" / name)
    source = package.open_source(f"folder:{tmp_path}/in", "train")
    out = tmp_path / f"out.{suffix}"
    table = embed(monkeypatch, made / "convnet", f"folder:{tmp_path}/in", out)
    assert table.names == source.names == ["a/9.png", "a/x/1.jpg", "b/2.png", "b/ü.png"]
    assert table.class_names == ["a", "b"] and table.labels.tolist() == [0, 0, 1, 1]
    assert table.features.shape == (4, 16) and table.features.dtype == np.float32
    assert table.about["step"] == "7" and table.about["encoder"] == "convnet"
    network, preprocess = load_encoder(made / "convnet")
    by_hand = torch.stack([preprocess(tmp_path / "in" / name) for name in table.names])
    assert np.allclose(network(by_hand).numpy(), table.features, atol=1e-6)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    without = embed(monkeypatch, made / "convnet", f"npz:{made}/images.npz", tmp_path / f"b.{suffix}")
    assert without.names == [str(i) for i in range(IMAGES)] and without.labels.tolist() == [i % 10 for i in range(70)]
    pixels = np.load(made / "images.npz")["images"]
    by_hand = torch.stack([preprocess(image) for image in pixels])
    assert np.allclose(network(by_hand).numpy(), without.features, atol=1e-6)


def test_damaged_parts_and_those_of_another_work_are_made_anew(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = f"npz:{made}/images.npz", tmp_path / "out.npz"
    expected = embed(monkeypatch, made / "convnet", source, tmp_path / "expected.npz").features
    folder = command.parts_folder(out)
    other = work_of(made, made / "resnet", source, out)
    compute_all(str(tmp_path), {folder.name: other})
    (folder / "kept").write_text("")
    work = work_of(made, made / "convnet", source, out)
    work.write(folder, 1, expected[work.images(1)])
    assert missing(work, folder) == [0]
    data = part_path(folder, 1).read_bytes()
    part_path(folder, 1).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert missing(work, folder) == [0, 1]
    work.write(folder, 1, expected[work.images(1)])
    assert np.array_equal(embed(monkeypatch, made / "convnet", source, out).features, expected)
    assert out.read_bytes() == (tmp_path / "expected.npz").read_bytes() and not folder.exists()


def test_a_killed_command_goes_on(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two real workers, without a terminal, in a locale of ASCII alone and 40 columns."""
    whole, out = tmp_path / "whole.npz", tmp_path / "out.npz"
    expected = embed(monkeypatch, made / "resnet.safetensors", "digits", whole)
    words = ["embed", str(made / "resnet.safetensors"), "digits", str(out), "--workers", "2"]
    path = {"PYTHONPATH": str(Path(package.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    surroundings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "40"}
    started = subprocess.Popen(
        [sys.executable, "-m", "kilobatch", *words],
        env=os.environ | path | surroundings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    folder = command.parts_folder(out)
    while not list(folder.glob("part-*")):
        assert started.poll() is None, started.communicate()[0].decode()
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not out.exists() and len(list(folder.glob("part-*"))) < 23
    done = subprocess.run(
        [sys.executable, "-m", "kilobatch", *words], env=os.environ | path | surroundings, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    printed = done.stdout.decode("ascii")
    assert "images to" in printed and "are done already" in printed
    assert f"wrote {out}: 1,437 images, 512 features each, 10 classes" in printed
    assert "Traceback" not in printed and done.stderr == b""
    assert out.read_bytes() == whole.read_bytes() and not folder.exists()
    assert expected.features.shape == (1437, 512)


def test_refusals(kilobatch: Callable[..., Any], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work: the fixture fails where workers are about to start."""
    run, file = str(made / "convnet"), str(made / "convnet.safetensors")
    there = tmp_path / "there.npz"
    there.write_text("precious")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    cases = {
        (run, "digits", "there.npz"): "there.npz exists; choose another name, or replace it with --force",
        (run, "digits", "."): "is a folder; name a file in it",
        (run, "digits", "a.csv"): "a.csv ends in '.csv'; features are written as .npz, .parquet, .safetensors",
        (run, "digits", "a.parquet"): "write a.npz or a.safetensors, or pip install pyarrow",
        (run, "digits", "no/a.npz"): "no is no folder; make it first",
        ("nothing", "digits", "a.npz"): "there is no run 'nothing'",
        (file, "folder:nowhere", "a.npz"): "folder:nowhere: there is no such folder",
        (file, "digit", "a.npz"): "data source 'digit' is unknown; did you mean 'digits'?",
        (file, "nowhere.beton", "a.npz"): "nowhere.beton does not exist",
    }
    for words, message in cases.items():
        done = kilobatch("embed", *words)
        assert done.code == 2 and message in " ".join(done.err.split()), (words, done.err)
    assert there.read_text() == "precious" and {path.name for path in tmp_path.iterdir()} <= {"there.npz", "cache"}


def test_an_export_says_how_images_are_prepared(kilobatch: Callable[..., Any], made: Path) -> None:
    done = kilobatch("export", str(made / "convnet"), "e.safetensors")
    assert done.code == 0, done.err
    _, preprocess = load_encoder("e.safetensors")
    described = repr(preprocess).removeprefix("Preprocess(").removesuffix(")")
    assert described.startswith("the whole image, resized to 32 x 32 (bilinear, antialiased), mean [")
    assert f"it takes images prepared so: {described}\n" in done.out
    assert "in Python: network, preprocess = kilobatch.load_encoder('e.safetensors')\n" in done.out
    assert metadata_of(Path("e.safetensors"))["preprocess"] == described


def test_force_replaces_and_another_command_is_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, source = tmp_path / "out.npz", f"npz:{made}/images.npz"
    out.write_text("old")
    assert len(embed(monkeypatch, made / "convnet", source, out, force=True).features) == IMAGES
    with command._locked(command.parts_folder(out), out), pytest.raises(package.UserError, match="is being written by"):
        embed(monkeypatch, made / "convnet", source, out, force=True)
