"""Damage at random places of a .beton, its note and its names: each is refused in one message, or changes nothing.

Positions are uniform over each region, and the seed is stated. What is compared are the batches as a loader gives them,
the labels, the classes and the images' names.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from kilobatch.data.beton import names_path, note_path, read_labels, read_names, verify_beton
from kilobatch.data.errors import UserError
from kilobatch.data.sources.adopt import adopt
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.folder import Folder
from tests.helpers.ffcv_files import ffcv_file
from tests.helpers.loaders import photo, plain, stacked

SEED = 12
FLIPS = 40  # in each region
CUTS = 40
PAGE = 4096
READERS: dict[str, Callable[[Path], object]] = {
    "batches": lambda beton: [part.tobytes() for part in map(torch.Tensor.numpy, stacked(list(plain(beton))))],
    "labels": lambda beton: read_labels(beton).tolist(),
    "classes": lambda beton: verify_beton(beton).classes,
    "names": read_names,
    "whole": lambda beton: verify_beton(beton, full=True),
}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images, some stored as pixels and some as JPEGs, with names."""
    folder = tmp_path_factory.mktemp("own")
    for i in range(8):
        (folder / "in" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        photo(i, 60 + 2 * i, 62).save(folder / "in" / "ab"[i % 2] / f"{i}.png")
    convert(Folder(folder / "in", "train"), folder / "own.beton", progress=False)
    return folder / "own.beton"


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = ffcv_file(tmp_path_factory.mktemp("adopted") / "theirs.beton", ["text", "label", "image"], page_size=1 << 21)
    adopt(path, progress=False)
    return path


def results(beton: Path) -> dict[str, object]:
    """What each reader gives, or its message."""
    found: dict[str, object] = {}
    for name, read in READERS.items():
        try:
            found[name] = read(beton)
        except UserError as error:
            found[name] = error
    return found


def refused(beton: Path, right: dict[str, object]) -> set[str]:
    """The readers that refuse; asserts that the others give what is right, and that messages have one line and a
    name."""
    found = results(beton)
    errors = {name: str(value) for name, value in found.items() if isinstance(value, UserError)}
    for name, value in found.items():
        assert name in errors or value == right[name], name
    for message in errors.values():
        assert beton.name in message and "\n" not in message and len(message) < 1000, message
    return errors.keys() - {name for name, value in right.items() if isinstance(value, UserError)}


def regions(beton: Path) -> dict[str, tuple[Path, int, int]]:
    """Name -> file, first and last byte + 1."""
    info = verify_beton(beton)
    rows = info.rows.first_row
    data = np.fromfile(beton, np.uint8)
    first = int(min(np.frombuffer(data, info.rows.dtype(), info.samples, rows)["data_ptr"]))
    samples = [np.flatnonzero(data[first : info.alloc_table_ptr])[-1] + first + 1]
    found = {
        "header": (beton, 0, 24),
        "fields": (beton, 24, rows),
        "rows": (beton, rows, rows + info.samples * info.rows.bytes),
        "padding": (beton, rows + info.samples * info.rows.bytes, first),
        "data": (beton, first, int(samples[0])),
        "allocation table": (beton, info.alloc_table_ptr, info.bytes),
        "note": (note_path(beton), 0, note_path(beton).stat().st_size),
    }
    if info.names_sha256 is not None:
        found["names"] = (names_path(beton), 0, names_path(beton).stat().st_size)
    return found


@contextmanager
def changed(file: Path, first: int, new: bytes) -> Iterator[None]:
    """The file with other bytes from `first` on."""
    with file.open("r+b", buffering=0) as handle:
        old = os.pread(handle.fileno(), len(new), first)
        os.pwrite(handle.fileno(), new, first)
        try:
            yield
        finally:
            os.pwrite(handle.fileno(), old, first)


@contextmanager
def cut(file: Path, size: int) -> Iterator[None]:
    data = file.read_bytes()
    os.truncate(file, size)
    try:
        yield
    finally:
        with file.open("r+b") as handle:
            handle.seek(size)
            handle.write(data[size:])


TABLES = {"batches", "labels", "classes", "names", "whole"}
REFUSING = {"padding": {"whole"}, "data": {"batches", "whole"}, "names": {"names", "whole"}}  # in other regions: all


@pytest.mark.parametrize("kind", ["own", "adopted"])
def test_a_flipped_bit_is_refused_or_changes_nothing(kind: str, request: pytest.FixtureRequest):
    beton = request.getfixturevalue(kind)
    random, right = np.random.default_rng(SEED), results(beton)
    available = {name for name, value in right.items() if not isinstance(value, UserError)}
    assert available == TABLES - ({"names"} if kind == "adopted" else set())
    for region, (file, first, last) in regions(beton).items():
        for _ in range(FLIPS):
            place, bit = int(random.integers(first, last)), int(random.integers(8))
            flipped = bytes([file.read_bytes()[place] ^ 1 << bit])
            with changed(file, place, flipped):
                refusing = refused(beton, right)
            if (kind, region) == ("adopted", "data"):  # it holds another field, too, which no batch shows
                assert "whole" in refusing, (place, bit)
            else:
                assert refusing == REFUSING.get(region, TABLES) & available, (region, place, bit)
    assert not refused(beton, right)


@pytest.mark.parametrize("kind", ["own", "adopted"])
def test_a_file_that_is_cut_or_has_a_page_of_zeros_is_refused_or_gives_the_same(
    kind: str, request: pytest.FixtureRequest
):
    beton = request.getfixturevalue(kind)
    random, right = np.random.default_rng(SEED), results(beton)
    pages = 0
    for region, (file, first, last) in regions(beton).items():
        for _ in range(-(-CUTS // 8)):
            with cut(file, int(random.integers(first, last))):
                assert "whole" in refused(beton, right), region
            page = int(random.integers(first, last)) // PAGE * PAGE
            before = file.read_bytes()[page : page + PAGE]
            with changed(file, page, bytes(len(before))):
                assert ("whole" in refused(beton, right)) == any(before), (region, page)
            pages += any(before)
    assert pages > 20 and not refused(beton, right)


def test_notes_and_names_of_another_file_are_refused(own: Path, tmp_path: Path):
    files = {suffix: own.with_name(own.name + suffix).read_bytes() for suffix in ("", ".json", ".names")}
    photo(9, 70, 70).save(own.parent / "in" / "a" / "9.png")
    other = tmp_path / "own.beton"
    convert(Folder(own.parent / "in", "train"), other, progress=False)
    right = results(other)
    for suffix, content in files.items():
        path = other.with_name(other.name + suffix)
        before = path.read_bytes()
        path.write_bytes(content)
        assert refused(other, right) == (REFUSING["names"] if suffix == ".names" else TABLES)
        path.write_bytes(before)
    assert not refused(other, right)


def test_adopting_a_file_with_a_flipped_bit_ends_in_one_message_or_in_a_file_that_can_be_read(adopted: Path):
    """Without a note damage to labels and pixels cannot be seen; all else has to fit together."""
    note = note_path(adopted).read_bytes()
    random, outcomes = np.random.default_rng(SEED), {True: 0, False: 0}
    for file, first, last in list(regions(adopted).values())[:6]:
        for _ in range(FLIPS):
            place, bit = int(random.integers(first, last)), int(random.integers(8))
            note_path(adopted).unlink(missing_ok=True)
            with changed(file, place, bytes([file.read_bytes()[place] ^ 1 << bit])):
                try:
                    adopt(adopted, progress=False)
                except UserError as error:
                    outcomes[False] += 1
                    assert adopted.name in str(error) and not note_path(adopted).exists()
                else:
                    outcomes[True] += 1
                    list(plain(adopted))
    note_path(adopted).write_bytes(note)
    assert min(outcomes.values()) > 40
