"""parquet:, hf:, torchvision: and python:, where they differ from files: columns, splits, items; what is refused."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kilobatch.data.errors import UserError
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.image_files import BrokenImage
from kilobatch.data.sources.parquet_files import ParquetImages
from kilobatch.data.sources.specs import count_images, has_test_split, open_source
from tests.helpers.beton_contents import stored_pixels
from tests.helpers.photo_sources import CLASSES, synthetic_photos, write_parquet, write_saved

PHOTOS = synthetic_photos(9, side=20)


def write_table(path: Path, **columns: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table(columns), path)


def test_columns_of_other_programs(tmp_path: Path):
    data = [data for _, data, _ in PHOTOS[:3]]
    write_table(tmp_path / "a.parquet", id=[1, 2, 3], jpg=data, kind=["b", None, "a"], label=[1, None, 0])
    spec = f"parquet:{tmp_path}/a.parquet"
    source = open_source(spec, "train")
    assert (source.classes, source.labels.tolist()) == (["0", "1"], [1, -1, 0])
    assert source.names == [f"a.parquet:{i}" for i in range(3)] and source[0][0].shape == (20, 30, 3)
    source = open_source(f"{spec}?label=kind&image=jpg", "train")
    assert (source.classes, source.labels.tolist()) == (["a", "b"], [1, -1, 0])
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    assert open_source(f"{spec}?classes=names.txt", "train").classes == ["ant", "bee"]
    for options, says in (
        ("?image=photo", r"has no column 'photo'; known: id, jpg, kind, label; correct image=photo"),
        ("?image=id", r"the column id is int64; images are the bytes of files, .* image=COLUMN"),
        ("?label=jpg", r"the column jpg is binary; labels are whole numbers or texts"),
    ):
        with pytest.raises(UserError, match=says):
            open_source(spec + options, "train")
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(UserError, match=r"a.parquet cannot be read: .*; check it, or write it again"):
        open_source(spec, "train")


def test_a_row_without_an_image_is_broken(tmp_path: Path):
    write_table(tmp_path / "a.parquet", image=[PHOTOS[0][1], None])
    with pytest.raises(BrokenImage, match=r"a.parquet, row 1 \(a.parquet:1\) has no image"):
        open_source(f"parquet:{tmp_path}/a.parquet", "train")[1]


def test_few_row_groups_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("pyarrow")
    write_parquet(tmp_path, PHOTOS, CLASSES, group=1)
    monkeypatch.setattr("kilobatch.data.sources.parquet_files.HELD", 0)
    source = open_source(f"parquet:{tmp_path}/part-*.parquet", "train")
    assert isinstance(source, ParquetImages)
    for i in (*range(9), 0):
        assert source._bytes(i)[1] == PHOTOS[i][1] and len(source._groups) <= 2


def test_a_saved_data_set_has_splits(tmp_path: Path):
    pytest.importorskip("pyarrow")
    write_saved(tmp_path / "train", PHOTOS, CLASSES)
    write_saved(tmp_path / "validation", PHOTOS[:2], CLASSES)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert [count_images(f"hf:{tmp_path}", split) for split in ("train", "test")] == [9, 2]
    assert (
        count_images(f"hf:{tmp_path}?split=validation", "train")
        == 2
        == count_images(f"hf:{tmp_path}/validation", "test")
    )
    assert [has_test_split(f"hf:{tmp_path}{end}") for end in ("", "/train", "?split=train")] == [True, False, False]
    write_saved(tmp_path / "test", PHOTOS[:3], CLASSES)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    state = json.loads((tmp_path / "test" / "state.json").read_text()) | {"_indices_files": [{"filename": "i.arrow"}]}
    (tmp_path / "test" / "state.json").write_text(json.dumps(state))
    for spec, says in (
        ("", r"has 2 splits of test images; name one: .*\?split=validation or .*\?split=test"),
        ("?split=dev", r"has no split 'dev'"),
        ("/train?split=train", r"is one split; leave out split=train"),
        ("?split=test", r"chooses rows of other files; save it again by flatten_indices\(\)"),
        ("/none", r"there is no such folder; give a folder that save_to_disk\(\) wrote"),
    ):
        with pytest.raises(UserError, match=says):
            open_source(f"hf:{tmp_path}{spec}", "test")


def write_mnist(root: Path, name: str, pixels: NDArray[np.uint8], labels: list[int]) -> None:
    """Of all data sets of torchvision it is the one whose files need no certain checksums."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, *pixels.shape) + pixels.tobytes())
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, len(labels)) + bytes(labels))


def test_data_sets_of_torchvision(tmp_path: Path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28), np.uint8)
    write_mnist(tmp_path, "train", pixels[:3], [2, 0, 1])
    write_mnist(tmp_path, "t10k", pixels[3:], [2])
    spec = f"torchvision:MNIST:{tmp_path}"
    train, test = (open_source(spec, split) for split in ("train", "test"))
    assert (train.classes[:2], train.labels.tolist(), test.labels.tolist()) == (["0 - zero", "1 - one"], [2, 0, 1], [2])
    assert has_test_split(spec) and not has_test_split(f"{spec}?train=true")
    convert(train, tmp_path / "a.beton", threads=2, progress=False)
    assert all((a == b[:, :, None]).all() for a, b in zip(stored_pixels(tmp_path / "a.beton"), pixels[:3], strict=True))
    before = train.fingerprint()
    write_mnist(tmp_path, "train", pixels[1:3], [2, 0])
    assert open_source(spec, "train").fingerprint() != before
    for other, says in (
        ("MNISTS:@", r"torchvision.datasets has no MNISTS; did you mean '\w*MNIST'"),
        ("STL10:@/none", r"there is no folder .*none"),
        ("STL10:@", r"STL10:.* cannot be opened: Dataset not found.*fetch it with: python -c .*STL10.*split='train'"),
        ("MNIST:@?size=3", r"MNIST has no option 'size'; known: train"),
        ("MNIST:@?train=7&train=8", r"has the option train twice"),
    ):
        with pytest.raises(UserError, match=says):
            open_source(f"torchvision:{other}".replace("@", str(tmp_path)), "train")


OWN = """
import numpy as np, torch
from PIL import Image

class Birds:
    classes = ["owl", "tit"]
    def __init__(self, split, size=8): self.size = size + (split == "test")
    def __len__(self): return 3
    def __getitem__(self, i): return Image.new("L", (self.size, 8), i), (i + 1) % 2

class Told(Birds):
    labels, fingerprint = [0, -1, 1], "as ever"

def tensors():
    return [(torch.full((3, 5, 4), 9).byte(), torch.tensor(1)), (torch.zeros(1, 5, 4).byte(), 0)]

def missing(a): return []
arrays = [np.full((4, 6, 3), 7, np.uint8), np.zeros((4, 6), np.uint8)]
bad = [np.zeros((4, 6, 5), np.uint8), torch.zeros(2, 5, 4), torch.zeros(3, 4, 4), np.zeros((3, 0), np.uint8), "a.png"]
triples = [(arrays[0], 1, 2)]
text_labels = [(arrays[0], "owl")]
none = []
number = 3
"""


def test_python_objects(tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)
    spec = f"python:{tmp_path}/own.py"
    birds = open_source(f"{spec}:Birds?size=4", "test")
    assert (birds.classes, birds.labels.tolist(), birds[2][0].shape) == (["owl", "tit"], [1, 0, 1], (8, 5, 3))
    assert open_source(f"{spec}:Birds", "train").fingerprint() != birds.fingerprint()
    told = open_source(f"{spec}:Told", "train")
    assert (
        told.labels.tolist() == [0, -1, 1] and told.fingerprint() == open_source(f"{spec}:Told", "train").fingerprint()
    )
    arrays, tensors = open_source(f"{spec}:arrays", "train"), open_source(f"{spec}:tensors", "train")
    assert (arrays.classes, arrays.labels.tolist()) == ([], [-1, -1])
    assert (arrays[0][0] == 7).all() and arrays[1][0].shape == (4, 6, 3)
    assert (tensors.classes, tensors.labels.tolist(), tensors[0][0].shape) == (["0", "1"], [1, 0], (5, 4, 3))
    info = convert(birds, tmp_path / "a.beton", threads=3, progress=False)
    assert [int(pixels[0, 0, 0]) for pixels in stored_pixels(tmp_path / "a.beton")] == [0, 1, 2] and info.samples == 3
    bad = open_source(f"{spec}:bad", "train")
    for i, says in enumerate(
        ("5 channels, where", "2 channels, where", "float32, not uint8", "array \\(3, 0\\)", "is a str")
    ):
        with pytest.raises(UserError, match=rf"own.py:bad, item {i} .*{says}") as caught:
            bad.encode(i, None)  # pyright: ignore[reportArgumentType] - it is refused before
        assert not isinstance(caught.value, BrokenImage)  # never left out as one


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Bird", "has no Bird; did you mean 'Birds'?"),
        ("none", "has no items"),
        ("number", "is of type int, without len()"),
        ("missing", "missing a required argument: 'a'; give its arguments as options"),
        ("Birds?colour=red", "unexpected keyword argument 'colour'"),
        ("arrays?size=3", "takes no options; leave out size"),
        ("triples", "item 0 has 3 parts"),
        ("text_labels", "item 0 has the label 'owl' (str); give a whole number"),
    ],
)
def test_python_objects_are_refused(name: str, says: str, tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(UserError) as caught:
        open_source(f"python:{tmp_path}/own.py:{name}", "train")
    assert says in str(caught.value)
