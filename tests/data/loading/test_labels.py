"""The images that have labels: balanced, nested shares; lists of names; loaders that keep or drop the others."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from kilobatch.data.beton import names_path, read_labels, read_names, verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.loading.labels import balanced_share, count_labelled, labelled_samples, samples_in_list
from kilobatch.data.loading.loader import Loader, LoaderWorker
from kilobatch.data.loading.options import LabelOptions
from kilobatch.data.loading.sampling import epoch_order, rank_batches
from kilobatch.data.sources.convert import convert, prepare
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.specs import open_source
from kilobatch.data.views.options import Views

UNEVEN = np.repeat(np.arange(4), (1, 3, 60, 136))  # 200 images in order of their classes
VIEWS = Views(size=16)


def counts(labels: np.ndarray, some: np.ndarray) -> list[int]:
    return np.bincount(labels[some], minlength=int(labels.max()) + 1).tolist()


def test_a_share_is_as_even_over_classes_as_can_be():
    even = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 144))
    assert (
        set(counts(even, balanced_share(even, 10, 0.05, 0))) == {7, 8} and len(balanced_share(even, 10, 0.05, 0)) == 72
    )
    assert sorted(counts(even, balanced_share(even, 10, 0.1, 3))) == [14] * 6 + [15] * 4
    assert counts(UNEVEN, balanced_share(UNEVEN, 4, 0.1, 0)) == [
        1,
        3,
        8,
        8,
    ]  # a class with fewer images gives all of them
    assert counts(UNEVEN, balanced_share(UNEVEN, 4, 0.001, 0)) == [1, 1, 1, 1]  # one at least
    assert balanced_share(UNEVEN, 4, 1.0, 0).tolist() == list(range(200))


def test_shares_of_one_seed_lie_within_each_other():
    parts = (0.001, 0.01, 0.1, 0.33, 0.5, 0.9, 1.0)
    for seed in (0, 1, 2**62):
        nested = [set(balanced_share(UNEVEN, 4, part, seed).tolist()) for part in parts]
        assert all(small < large for small, large in zip(nested, nested[1:], strict=False) if len(small) < len(large))
    assert len({tuple(balanced_share(UNEVEN, 4, 0.2, seed)) for seed in range(20)}) == 20


def test_a_share_is_the_same_on_every_machine_and_version():
    assert balanced_share(np.arange(24) % 3, 3, 0.25, 7).tolist() == [2, 9, 11, 12, 19, 22]


def test_a_list_names_images_by_path_or_last_part(tmp_path: Path):
    names = ["a/1.png", "a/2.png", "b/1.png", "b/c/3.png"]
    file = tmp_path / "some.txt"

    def found(text: str) -> list[int]:
        file.write_text(text)
        return samples_in_list(names, file, "x.beton").tolist()

    assert found("b/1.png\n3.png\n\n a/2.png \n2.png\n./b/1.png\n") == [1, 2, 3]
    with pytest.raises(UserError, match=r"'1.png' is the name of 2 images .* such as a/1.png and b/1.png"):
        found("1.png\n")
    with pytest.raises(UserError, match=r"4 of its 5 lines name no image of x.beton, such as w, x, y "):
        found("w\nx\n3.png\ny\nz\n")
    for text, reason in (("\n", "names no image"), (None, "cannot be read")):
        file.write_text(text) if text else file.unlink()
        with pytest.raises(UserError, match=reason):
            samples_in_list(names, file, "x.beton")


def test_a_list_names_images_of_any_name(tmp_path: Path):
    folder, file = tmp_path / "in" / "cat", tmp_path / "some.txt"
    folder.mkdir(parents=True)
    odd = ["a\nb", "a\\nb", " a ", "a", "a\u2028b", "é", "e\u0301", "ö", os.fsdecode(b"\xff"), "#c"]
    for name in odd:
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    names = Folder(tmp_path / "in", "train").names

    def found(line: str, newline: str = "\n") -> list[str]:
        file.write_bytes(os.fsencode(line + newline))
        return [names[i] for i in samples_in_list(names, file, "x.beton")]

    for name in names:  # the lines of FILE.names
        assert found(name) == found(name, "\r\n") == found(name.removeprefix("cat/")) == [name]
    assert found("cat/a\\nb.png") == ["cat/a\\nb.png"] != found("cat/a\\\\nb.png")  # FILE.names before the disk
    assert found("o\u0308.png") == ["cat/ö.png"] and found("e\u0301.png") != found("é.png")
    assert found("\ufeffa.png") == ["cat/a.png"] and found(" a.png") == ["cat/a.png"] and found("a\u2028b.png")
    assert found(os.fsdecode(b"\xff.png")) == ["cat/\\udcff.png"]
    (folder / "a\\nb.png").rename(folder / "a\\tb.png")
    names = Folder(tmp_path / "in", "train").names
    assert found("a\\tb.png") == ["cat/a\\\\tb.png"]  # as the disk has it
    file.write_bytes("ö".encode("utf-16"))
    with pytest.raises(UserError, match=r"some.txt is not a text file; write the name of an image in each line"):
        samples_in_list(names, file, "x.beton")


def indices(beton: Path, options: LabelOptions) -> list[int]:
    some = labelled_samples(beton, options)
    assert some is not None
    return some.tolist()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 12 images, one of them broken."""
    folder = tmp_path_factory.mktemp("photos")
    for name, first in (("cat", 0), ("dog", 100)):
        (folder / name).mkdir()
        for i in range(12):
            Image.new("RGB", (20, 20), (first + i, 0, 0)).save(folder / name / f"{name}_{i}.png")
    (folder / "cat" / "cat_10.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def beton(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "photos.beton"
    convert(open_source(f"folder:{photos}", "train"), out, skip_broken=True, progress=False)
    return out


def test_a_converted_folder_keeps_its_names(photos: Path, beton: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = read_names(beton)
    assert len(names) == 23 and "cat/cat_10.png" not in names
    assert [name.startswith("dog") for name in names] == read_labels(beton).astype(bool).tolist()
    file = tmp_path / "some.txt"
    file.write_text("dog_3.png\ncat/cat_0.png\n")
    options = LabelOptions(list=str(file))
    assert indices(beton, options) == [names.index("cat/cat_0.png"), names.index("dog/dog_3.png")]
    assert count_labelled(str(beton), options) == count_labelled(f"folder:{photos}", options) == 2
    assert count_labelled("digits", LabelOptions(share=0.05)) == 72
    with pytest.raises(UserError, match=r"images of 'digits' have no names; use data.labels.share, or .* folder:PATH"):
        count_labelled("digits", options)
    monkeypatch.setenv("KILOBATCH_CACHE", str(tmp_path / "cache"))
    assert len(indices(prepare("digits", "test"), LabelOptions(share=0.05))) == 18  # of 360
    with pytest.raises(UserError, match=r"does not know the names .* kilobatch convert folder:PATH"):
        labelled_samples(prepare("digits", "test"), options)


def test_names_of_another_conversion_are_refused(photos: Path, tmp_path: Path):
    out = tmp_path / "photos.beton"
    convert(open_source(f"folder:{photos}", "train"), out, skip_broken=True, progress=False)
    names_path(out).write_text(names_path(out).read_text().replace("dog_3", "dog_4"))
    verify_beton(out)  # training without a list needs no names
    for ask in (read_names, lambda path: verify_beton(path, full=True)):
        with pytest.raises(UserError, match=r"photos.beton.names is not the one that was written with photos.beton"):
            ask(out)
    convert(open_source("digits", "test"), out, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos.beton", "photos.beton.json"]


def loader(beton: Path, some: list[int] | None, drop: bool, rank: int = 0, world: int = 1) -> Loader:
    labelled = None if some is None else np.array(some)
    worker = LoaderWorker(rank, world, 1, torch.device("cpu"))
    return Loader(beton, VIEWS, worker, batch=4, seed=5, labelled=labelled, drop_unlabelled=drop)


def epochs(one: Loader, first_step: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Index, label and views of the first three epochs, from a step of the first on."""
    with one:
        batches = [b for e in range(3) for b in one.epoch(e, first_step if e == 0 else 0)]
    index, label, views = zip(*((b.index, b.label, b.views[0]) for b in batches), strict=True)
    return torch.cat(index), torch.cat(label), torch.cat(views)


def test_a_loader_keeps_or_drops_what_has_no_label(beton: Path):
    some = [0, 2, 3, 5, 11, 12, 13, 17, 20, 22]
    index, label, views = epochs(loader(beton, None, False))
    kept = epochs(loader(beton, some, False))
    has = torch.isin(index, torch.tensor(some))
    assert torch.equal(kept[0], index) and torch.equal(kept[2], views)
    assert torch.equal(kept[1], torch.where(has, label, -1)) and 0 < has.sum() < len(has)

    dropped = loader(beton, some, True)
    assert (dropped.samples, dropped.steps_per_epoch) == (10, 2)
    dropped_index, dropped_label, dropped_views = epochs(dropped)
    expected = [np.array(some)[rank_batches(epoch_order(5, e, 10), 4, 0, 1)].ravel() for e in range(3)]
    assert dropped_index.tolist() == np.concatenate(expected).tolist()
    assert torch.equal(dropped_label, torch.from_numpy(read_labels(beton))[dropped_index])
    both = [
        i for i in dropped_index[:8].tolist() if i in index[:20].tolist()
    ]  # in the first epoch of both: the same view
    places = [(dropped_index[:8].tolist().index(i), index[:20].tolist().index(i)) for i in both]
    assert len(both) > 3 and all(torch.equal(dropped_views[a], views[b]) for a, b in places)


def test_a_dropping_loader_does_not_depend_on_ranks_nor_on_where_it_was_interrupted(beton: Path):
    some = list(range(3, 22, 2))
    whole = epochs(loader(beton, some, True))
    ranks = [epochs(loader(beton, some, True, rank=rank, world=2)) for rank in range(2)]
    for k, expected in enumerate(whole):
        parts = [rank[k].unflatten(0, (6, 2)) for rank in ranks]  # six steps of two samples each
        assert torch.equal(torch.cat(parts, 1).flatten(0, 1), expected)
    for one, expected in zip(epochs(loader(beton, some, True), first_step=1), whole, strict=True):
        assert torch.equal(one, expected[4:])
    with pytest.raises(UserError, match=r"3 samples with labels, fewer than one global batch of 4"):
        loader(beton, [1, 2, 3], True)
