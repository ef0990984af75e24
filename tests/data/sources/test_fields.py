"""Fields: further arrays of a source with a row for each image, kept in its .beton and read with its images."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ffcv.reader import Reader
from numpy.typing import NDArray

from kilobatch.data.batch import Batch
from kilobatch.data.beton import verify_beton
from kilobatch.data.beton_note import note_path
from kilobatch.data.errors import UserError
from kilobatch.data.loading.options import OrderOptions
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.specs import Split, field_forms, field_names, open_source
from kilobatch.data.views.options import Views
from tests.helpers import loaders

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (30, 8, 8, 3), np.uint8)
LABELS = np.arange(30) % 2
FIELDS: dict[str, NDArray[Any]] = {
    "tokens": RANDOM.integers(0, 50_000, (30, 3, 7)).astype(np.int32),
    "lengths": RANDOM.integers(0, 8, 30),
    "weight": RANDOM.random((30, 5)).astype(">f4"),
    "half": RANDOM.random((30, 1)).astype(np.float16),
    "small": RANDOM.integers(-9, 9, (30, 3)).astype(np.int8),
}
VIEWS = Views(size=8)
SPLITS: list[tuple[Split, NDArray[Any]]] = [("train", FIELDS["tokens"][:20]), ("test", FIELDS["tokens"][20:])]
save: Callable[..., None] = np.savez


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fields")
    save(folder / "a.npz", images=IMAGES, labels=LABELS, **FIELDS)
    convert(open_source(f"npz:{folder / 'a.npz'}", "train"), folder / "a.beton", progress=False)
    return folder / "a.beton"


def test_the_note_states_types_and_shapes(beton: Path):
    stated = {field.name: (field.dtype, field.shape) for field in verify_beton(beton, full=True).fields}
    assert stated == {
        "tokens": ("int32", (3, 7)),
        "lengths": ("int64", ()),
        "weight": ("float32", (5,)),
        "half": ("float16", (1,)),
        "small": ("int8", (3,)),
    }
    assert field_names(str(beton), "train") == list(FIELDS)
    assert field_names(f"npz:{beton.with_name('a.npz')}", "test") == sorted(FIELDS)
    assert field_names("digits", "train") == []
    forms = {form.name: form for form in field_forms(str(beton), "train")}
    assert {name: (form.dtype.name, form.shape) for name, form in forms.items()} == stated
    assert {form.name: form for form in field_forms(f"npz:{beton.with_name('a.npz')}", "test")} == forms
    assert field_forms("digits", "train") == []


def test_ffcv_reads_the_same_arrays(beton: Path):
    theirs = Reader(str(beton))
    assert theirs.field_names == ["image", "label", *FIELDS]
    shapes = {name: (theirs.handlers[name].shape, theirs.handlers[name].dtype) for name in FIELDS}
    assert shapes == {name: (x.shape[1:] or (1,), x.dtype.newbyteorder("<")) for name, x in FIELDS.items()}
    data, rows = beton.read_bytes(), theirs.metadata
    for number, x in enumerate(FIELDS.values(), 2):
        for i, start in enumerate(rows[f"f{number}"].tolist()):
            assert data[start:][: x[i].nbytes] == x[i].astype(x.dtype.newbyteorder("<")).tobytes()


def test_a_file_without_fields_is_as_it_always_was(tmp_path: Path):
    out = tmp_path / "a.beton"
    info = convert(Arrays(IMAGES, LABELS, ["cat", "dog"]), out, progress=False)
    assert info.fields == [] and b'fields": []' not in note_path(out).read_bytes()
    digests = [hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (out, note_path(out))]
    assert digests == GOLDEN  # of the commit before there were fields
    source = Arrays(IMAGES, LABELS, ["cat", "dog"])
    assert source.fingerprint() != Arrays(IMAGES, LABELS, ["cat", "dog"], FIELDS).fingerprint()


GOLDEN = ["3ff8011a315b818d", "52b6706550696aad"]


def loaded(beton: Path, **options: Any) -> list[Batch]:
    with loaders.loader(beton, VIEWS, **{"batch": 12, **options}) as one:
        return [batch for epoch in range(2) for batch in one.epoch(epoch)]


def test_a_loader_gives_the_fields_that_are_asked_for(beton: Path):
    plain = loaded(beton)
    assert all(batch.fields == {} for batch in plain)
    batches = loaded(beton, fields=list(FIELDS))
    for batch, expected in zip(batches, plain, strict=True):
        assert torch.equal(batch.views[0], expected.views[0]) and torch.equal(batch.index, expected.index)
        assert batch.fields.keys() == FIELDS.keys()
        for name, x in FIELDS.items():
            values = torch.from_numpy(x[batch.index.numpy()].astype(x.dtype.newbyteorder("=")))
            assert batch.fields[name].dtype == values.dtype and torch.equal(batch.fields[name], values)
    for world in (2, 3):
        ranks = [loaded(beton, fields=["tokens"], rank=rank, world=world) for rank in range(world)]
        for parts, expected in zip(zip(*ranks, strict=True), batches, strict=True):
            assert all(part.fields.keys() == {"tokens"} for part in parts)
            assert torch.equal(torch.cat([part.fields["tokens"] for part in parts]), expected.fields["tokens"])
    twice = loaded(beton, fields=["lengths"], options=OrderOptions(images_per_class=6))
    lengths = torch.from_numpy(FIELDS["lengths"])
    assert all(torch.equal(batch.fields["lengths"], lengths[batch.index]) for batch in twice)


def test_a_plain_loader_gives_them_too(beton: Path):
    batches = list(loaders.plain(beton, 8, rank=1, world=2, fields=["weight"]))
    weight = torch.cat([batch.fields["weight"] for batch in batches])
    assert torch.equal(weight, torch.from_numpy(FIELDS["weight"][15:].astype(np.float32)))
    assert all(batch.fields == {} for batch in loaders.plain(beton, 8))


def test_a_field_that_is_absent_is_refused(beton: Path):
    with pytest.raises(UserError, match=r"a.beton has no field 'nodes' .*\(it has: tokens, lengths, weight, half, sm"):
        loaders.loader(beton, VIEWS, fields=["tokens", "nodes"])


def test_a_changed_field_is_found(beton: Path, tmp_path: Path):
    for path in beton.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path, where = tmp_path / beton.name, bytearray(beton.read_bytes())
    place = where.index(FIELDS["tokens"][17].tobytes())
    where[place + 5] ^= 1
    path.write_bytes(where)
    assert len(loaded(path, fields=["lengths"])) == 4  # it is not read
    with pytest.raises(UserError, match="the field 'tokens' of sample 17 has changed"):
        loaded(path, fields=["tokens"])
    with pytest.raises(UserError, match="1 of its 30 samples have changed: sample 17;"):
        verify_beton(path, full=True)


def test_a_split_has_fields_of_its_own(tmp_path: Path):
    path, spec = tmp_path / "a.npz", f"npz:{tmp_path / 'a.npz'}"
    tokens = {"tokens_train": FIELDS["tokens"][:20], "tokens_test": FIELDS["tokens"][20:]}
    save(path, x_train=IMAGES[:20], y_train=LABELS[:20], x_test=IMAGES[20:], y_test=LABELS[20:], **tokens)
    for split, expected in SPLITS:
        fields = open_source(spec, split).fields
        assert fields.keys() == {"tokens"} and np.array_equal(fields["tokens"], expected)
    del tokens["tokens_test"]
    save(path, x_train=IMAGES[:20], y_train=LABELS[:20], x_test=IMAGES[20:], y_test=LABELS[20:], **tokens)
    assert (field_names(spec, "train"), field_names(spec, "test")) == (["tokens"], [])


REFUSED: dict[str, tuple[str, Any, str]] = {
    "objects": ("tokens", np.array([None] * 30), "tokens holds Python objects; save it as a plain array"),
    "text": ("author", np.array("somebody"), "author is <U8; save it as one of int8, .* or leave author out"),
    "unsigned": ("tokens", np.zeros((30, 2), np.uint32), "tokens is uint32; save it as one of int8, int16, int32, int"),
    "another length": ("tokens", np.zeros((29, 2)), r"tokens has shape \(29, 2\), and images has 30 images; give each"),
    "a number": ("version", np.array(3), r"version has shape \(\), and images has 30 images"),
    "nothing in it": ("tokens", np.zeros((30, 0)), r"tokens has shape \(30, 0\)"),
    "a long name": ("tokens_of_captions", np.zeros(30), "cannot be the name of a field .* use up to 16 letters"),
    "another's name": ("label", np.zeros(30), "label cannot be the name of a field beside image and label"),
    "too large": ("tokens", np.zeros((30, 2**21)), "tokens has 16,777,216 bytes for an image; 8,388,608 are allowed"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_array_that_can_be_no_field_is_refused(tmp_path: Path, case: str):
    name, array, message = REFUSED[case]
    save(tmp_path / "a.npz", images=IMAGES, labels=LABELS, **{name: array})
    with pytest.raises(UserError, match=message):
        open_source(f"npz:{tmp_path / 'a.npz'}", "train")
