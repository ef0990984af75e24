"""Every kind of source makes the same .beton of the same photographs: bytes of images, labels, names of classes."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from kilobatch.data.beton import read_labels, verify_beton
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.specs import open_source
from tests.helpers.beton_contents import stored_files
from tests.helpers.photo_sources import (
    CLASSES,
    Photo,
    synthetic_photos,
    write_lists,
    write_parquet,
    write_saved,
    write_shards,
    write_tree,
)

REAL = Path(__file__).resolve().parents[4] / "shared" / "data" / "imagenette160_subset.tar"
SPECS = (
    "folder:@/in",
    "tree:@/in",
    r"tree:@/in?label=([^/]+)/[^/]+$",
    "list:@/in/train.txt",
    "csv:@/in/train.csv",
    "tar:@/shard-{0..2}.tar",
    "tar:@/shard-*.tar",
    "parquet:@/part-*.parquet",
    "hf:@/saved",
)


def real_photos(each: int = 8) -> list[Photo]:
    """The first photographs of each of three classes of Imagenette."""
    found: dict[str, list[tuple[str, bytes]]] = {}
    with tarfile.open(REAL) as archive:
        for member in archive:
            _, name, _ = member.name.split("/")
            if len(found) > 3:
                break
            if member.isfile() and len(found.setdefault(name, [])) < each:
                file = archive.extractfile(member)
                assert file is not None
                found[name].append((member.name.removeprefix("train/"), file.read()))
    names = sorted(found)[:3]
    return [(path, data, label) for label, name in enumerate(names) for path, data in sorted(found[name])]


def write_all(root: Path, photos: list[Photo], classes: list[str]) -> None:
    write_tree(root / "in", photos)
    write_lists(root / "in", photos, classes)
    write_shards(root, photos, classes, each=-(-len(photos) // 3))
    write_parquet(root, photos, classes)
    write_saved(root / "saved", photos, classes)


def same_content(root: Path, photos: list[Photo], classes: list[str]) -> None:
    for number, spec in enumerate(SPECS):
        source = open_source(spec.replace("@", str(root)), "train")
        info = convert(source, root / f"{number}.beton", threads=1 + number % 3, progress=False)
        assert verify_beton(root / f"{number}.beton", full=True) == info
        assert (info.classes, info.samples) == (classes, len(photos)), spec
        assert read_labels(root / f"{number}.beton").tolist() == [label for *_, label in photos], spec
        beton = (root / f"{number}.beton").read_bytes()
        assert beton == (root / "0.beton").read_bytes(), spec
    stored = [data for *_, data in stored_files(root / "0.beton")]
    assert [data.endswith(kept) or kept.startswith(data) for data, (_, kept, _) in zip(stored, photos, strict=True)]


def test_every_kind_of_source_gives_the_same_file(tmp_path: Path):
    pytest.importorskip("pyarrow")
    photos = synthetic_photos()
    write_all(tmp_path, photos, CLASSES)
    same_content(tmp_path, photos, CLASSES)


def test_every_kind_of_source_gives_the_same_file_of_photographs(tmp_path: Path):
    pytest.importorskip("pyarrow")
    if not REAL.exists():
        pytest.skip(f"{REAL.name} is not here")
    photos = real_photos()
    classes = sorted({path.split("/")[0] for path, *_ in photos})
    write_all(tmp_path, photos, classes)
    same_content(tmp_path, photos, classes)


@pytest.mark.parametrize("spec", SPECS[1:])
def test_images_without_labels_have_the_label_minus_one(spec: str, tmp_path: Path):
    pytest.importorskip("pyarrow")
    write_all(tmp_path, synthetic_photos(6, side=66), CLASSES)
    spec = f"{spec.partition('?')[0]}?label=none".replace("@", str(tmp_path))
    if "shard" in spec:
        spec = spec.replace("{0..2}", "0")
    source = open_source(spec, "train")
    info = convert(source, tmp_path / "a.beton", threads=1, progress=False)
    assert info.classes == [] and (read_labels(tmp_path / "a.beton") == -1).all() and info.samples == len(source)
    assert source.labels.dtype == np.int64
