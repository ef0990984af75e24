"""Conversion to .beton: FFCV reads the same images, a killed or failed conversion leaves no bad file; the cache."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kilobatch.data.beton import verify_beton
from kilobatch.data.beton_layout import ALLOCATION, FIELD, HEADER, SAMPLE
from kilobatch.data.beton_writer import Writer
from kilobatch.data.errors import UserError
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.convert import convert, prepare
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.image_files import EncodedImage, read_image
from kilobatch.data.sources.progress_bar import progress_bar
from kilobatch.data.sources.specs import Split, count_images, open_source
from tests.helpers.own_cache import own_cache
from tests.helpers.programs import PROGRAMS

KILLED = PROGRAMS / "killed_conversions.py"


def photos(folder: Path, images: int = 12, side: int = 80) -> str:
    """A folder of JPEG (colour, grey, CMYK) and PNG photos of one size, in three classes."""
    random = np.random.default_rng(0)
    for i in range(images):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
        image = coarse.resize((side + 10, side), Image.Resampling.BICUBIC)
        path = folder / f"class{i % 3}" / f"{i:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if i % 4 == 3:
            image.save(path.with_suffix(".png"))
        else:
            image.convert(("RGB", "L", "CMYK")[i % 4]).save(path, quality=95)
    return f"folder:{folder}"


def numbers(images: int = 20) -> Arrays:
    pixels = np.random.default_rng(1).integers(0, 256, (images, 9, 7, 3), np.uint8)
    return Arrays(pixels, np.arange(images) % 4, ["a", "b", "c", "d"])


def test_ffcv_reads_the_same_images_and_labels(tmp_path: Path):
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    def read_back(path: Path, os_cache: bool) -> Iterator[tuple[np.ndarray, int]]:
        pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
        options = {"os_cache": os_cache, "order": OrderOption.SEQUENTIAL, "drop_last": False, "pipelines": pipelines}
        loader = Loader(str(path), 5, num_workers=1, **options)
        for images, labels in loader:
            yield from ((image.copy(), int(label)) for image, label in zip(images, labels[:, 0], strict=True))

    for name, source, near in (
        ("jpeg", open_source(photos(tmp_path / "photos"), "train"), 2.0),
        ("raw", numbers(), 0.0),
    ):
        info = convert(source, tmp_path / f"{name}.beton", encoding=Encoding(quality=95), progress=False)
        assert info.samples == len(source) and info.classes == source.classes and not info.skipped
        found = list(read_back(tmp_path / f"{name}.beton", os_cache=name == "jpeg"))
        for i, (image, label) in enumerate(found):
            pixels, expected = source[i]
            assert label == expected and np.abs(image.astype(float) - pixels).mean() <= near, (name, i)
        assert len(found) == len(source)


def test_the_layout_is_ffcvs_own(tmp_path: Path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.reader import Reader
    from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType, get_metadata_type
    from ffcv.writer import DatasetWriter

    assert [t.itemsize for t in (HEADER, FIELD, SAMPLE, ALLOCATION)] == [
        t.itemsize
        for t in (HeaderType, FieldDescType, get_metadata_type([RGBImageField(), IntField()]), ALLOC_TABLE_TYPE)
    ]
    source = numbers()
    fields = {"image": RGBImageField(), "label": IntField()}
    DatasetWriter(str(tmp_path / "theirs.beton"), fields, num_workers=1).from_indexed_dataset(source)
    convert(source, tmp_path / "ours.beton", progress=False)
    ours, theirs = (Reader(str(tmp_path / f"{name}.beton")) for name in ("ours", "theirs"))
    assert ours.metadata.tobytes() == theirs.metadata.tobytes()
    assert ours.alloc_table.tobytes() == theirs.alloc_table.tobytes()
    assert (ours.field_descriptors == theirs.field_descriptors).all() and ours.page_size == theirs.page_size
    with pytest.raises(UserError, match="theirs.beton has no theirs.beton.json beside it.*kilobatch convert"):
        verify_beton(tmp_path / "theirs.beton")


def test_samples_do_not_cross_pages(tmp_path: Path):
    class Large(Arrays):
        def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
            return EncodedImage(0, 70, 70, bytes([i + 1]) * 3_000_000), i

    info = convert(Large(np.zeros((7, 1, 1), np.uint8), np.arange(7), ["a"] * 7), tmp_path / "a.beton", progress=False)
    data = (tmp_path / "a.beton").read_bytes()
    table = np.frombuffer(data, ALLOCATION, offset=info.alloc_table_ptr)
    page = Writer.PAGE
    assert (table["ptr"] // page == (table["ptr"] + table["size"] - 1) // page).all()
    for row in table:
        assert data[row["ptr"] : row["ptr"] + row["size"]] == bytes([row["sample_id"] + 1]) * 3_000_000


def test_bytes_depend_on_the_images_alone(tmp_path: Path):
    source = open_source(photos(tmp_path / "photos", 50), "train")
    sums = {convert(source, tmp_path / "a.beton", threads=t, progress=False).sha256 for t in (1, 3)}
    assert len(sums) == 1
    other = convert(source, tmp_path / "a.beton", encoding=Encoding(quality=50), progress=False)
    assert other.sha256 not in sums and verify_beton(tmp_path / "a.beton", full=True) == other


def test_max_side_and_quality(tmp_path: Path):
    source = open_source(photos(tmp_path / "photos", side=200), "train")
    info = convert(source, tmp_path / "a.beton", encoding=Encoding(100), progress=False)
    data = (tmp_path / "a.beton").read_bytes()
    row = np.frombuffer(data, SAMPLE, 1, 24 + 2 * 1041)[0]
    assert (row["mode"], row["width"], row["height"]) == (0, 100, 95)
    assert read_image(data[int(row["data_ptr"]) :], "a").shape == (95, 100, 3)
    assert info.max_side == 100
    with pytest.raises(UserError, match="--max-side is 0; it must be from 1 to"):
        convert(source, tmp_path / "b.beton", encoding=Encoding(0), progress=False)
    with pytest.raises(UserError, match="--quality is 101; it must be from 1 to 100"):
        convert(source, tmp_path / "b.beton", encoding=Encoding(quality=101), progress=False)
    with pytest.raises(UserError, match="--threads is 0; it must be from 1"):
        convert(source, tmp_path / "b.beton", threads=0, progress=False)


def test_broken_images_are_all_listed_and_refused_or_skipped(tmp_path: Path):
    spec = photos(tmp_path / "photos")
    (tmp_path / "photos" / "class0" / "text.jpg").write_text("no image")
    (tmp_path / "photos" / "class2" / "empty.png").touch()
    jpeg = tmp_path / "photos" / "class1" / "001.jpg"
    jpeg.write_bytes(jpeg.read_bytes()[:900])
    source = open_source(spec, "train")
    with pytest.raises(UserError, match=r"3 of 14 images are broken.*--skip-broken") as caught:
        convert(source, tmp_path / "a.beton", progress=False)
    for name in ("class0/text.jpg: not an image", "class2/empty.png: the file is empty", "class1/001.jpg: "):
        assert name in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    info = convert(source, tmp_path / "a.beton", skip_broken=True, progress=False)
    assert (info.samples, len(info.skipped)) == (11, 3) and verify_beton(tmp_path / "a.beton", full=True) == info
    assert count_images(str(tmp_path / "a.beton"), "train") == 11


def test_nothing_readable_is_refused_even_when_skipping(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_text("text")
    with pytest.raises(UserError, match="none of the 1 images can be read.*cat/a.png"):
        convert(open_source(f"folder:{tmp_path}", "train"), tmp_path / "a.beton", skip_broken=True, progress=False)


def test_a_source_that_fails_stops_the_conversion_and_leaves_nothing(tmp_path: Path):
    class Failing(Arrays):
        def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
            raise RuntimeError("the source's own fault")

    with pytest.raises(RuntimeError, match="own fault"):
        convert(Failing(np.zeros((99, 8, 8), np.uint8), np.zeros(99, int), ["a"]), tmp_path / "a.beton")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "folder.beton").mkdir()
    for name, message in (
        ("a.txt", r"a\.txt does not end in \.beton; write to .*a\.beton"),
        ("folder.beton", "is a folder; give another name"),
        ("..", r"is a folder; give the name of a file to write, such as .*train\.beton"),
        ("none/a.beton", "no folder .*none; make it first"),
        ("x" * 250 + ".beton", "cannot be written: File name too long.*name a place"),
    ):
        with pytest.raises(UserError, match=message):
            convert(numbers(), tmp_path / name, progress=False)


def test_what_lies_in_the_way_of_any_file_of_a_conversion(tmp_path: Path):
    """Nothing is written, rather than the .beton without its note."""
    partial = [f"a.beton{kind}.partial" for kind in ("", ".names", ".json")]
    for name in ("a.beton.names", "a.beton.json", *partial, "a.beton.tmp"):
        for make, kind in ((Path.mkdir, "a folder"), (os.mkfifo, "not a file")):
            make(tmp_path / name)
            with pytest.raises(UserError, match=rf"{name} is {kind}; give another name"):
                convert(numbers(), tmp_path / "a.beton", progress=False)
            assert [path.name for path in tmp_path.iterdir()] == [name]
            (tmp_path / name).rmdir() if kind == "a folder" else (tmp_path / name).unlink()
    for path in (Path(), Path("/")):
        with pytest.raises(UserError, match=r"is a folder; give the name of a file to write, such as"):
            convert(numbers(), path, progress=False)


def test_a_class_of_which_all_images_are_broken_is_refused(tmp_path: Path):
    """As a class folder without an image is: it would be a class that nothing belongs to."""
    photos(tmp_path / "in", images=4)
    (tmp_path / "in" / "class1" / "001.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"class 'class1' has no images but broken ones; mend one, or remove the class"):
        convert(Folder(tmp_path / "in", "train"), tmp_path / "a.beton", skip_broken=True, progress=False)
    assert not list(tmp_path.glob("a.beton*"))


def test_two_conversions_to_one_name(tmp_path: Path):
    with (tmp_path / "a.beton.partial").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"a\.beton\.partial is being written by another conversion; wait"):
            convert(numbers(), tmp_path / "a.beton", progress=False)
        assert (tmp_path / "a.beton.partial").exists()
    convert(numbers(), tmp_path / "a.beton", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.beton", "a.beton.json"]


def test_no_file_looks_whole_that_is_not_after_a_kill_at_any_moment(tmp_path: Path):
    done = subprocess.run([sys.executable, str(KILLED), str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *deaths, writing, again, room = done.stdout.splitlines()
    states = [line.rsplit(" ", 1)[1] for line in deaths]  # first A is there, then neither, then B
    assert deaths[-1] == "finished B" and states == sorted(states, key=["A", "refused", "B"].index), deaths
    assert states.count("A") >= 3 and states.count("refused") >= 3, deaths
    assert writing == "while writing: ['y.beton.partial', 'y.beton.tmp'] refused"
    assert again == "again: ['y.beton', 'y.beton.json'] A"
    assert room.startswith("no room: [] ") and "cannot be written: File too large" in room


def test_prepare_converts_once_for_all_processes(tmp_path: Path):
    code = (
        "from kilobatch.data.sources.convert import prepare; "
        "from kilobatch.data.sources.specs import open_source; open_source('digits', 'test'); "
        "print('ready', flush=True); print(prepare('digits', 'test'))"
    )
    environment = os.environ | {"KILOBATCH_CACHE": own_cache(tmp_path / "cache")}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, env=environment)

    out = Path(start().communicate(timeout=120)[0].split()[1])
    out.unlink()
    with out.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        both = [start(), start()]
        assert [process.stdout and process.stdout.readline() for process in both] == ["ready\n", "ready\n"]
        time.sleep(0.5)
        assert not out.exists()  # both wait
    outputs = [process.communicate(timeout=120) for process in both]
    assert [text.strip() for text, _ in outputs] == [str(out), str(out)]
    assert sum(errors.count("converting 360 images") for _, errors in outputs) == 1
    assert verify_beton(out, full=True).samples == 360


def test_prepare_follows_the_images_and_mends_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KILOBATCH_CACHE", str(tmp_path / "cache"))
    spec = photos(tmp_path / "photos", 4)
    first = prepare(spec, "train")
    written = first.stat().st_mtime_ns
    assert prepare(spec, "train") == first and first.stat().st_mtime_ns == written
    first.write_bytes(first.read_bytes()[:-1])
    assert prepare(spec, "train") == first and verify_beton(first).samples == 4
    photos(tmp_path / "photos", 5)
    second = prepare(spec, "train")
    assert second != first and verify_beton(second).samples == 5
    assert prepare(str(second), "train") == second
    monkeypatch.setenv("KILOBATCH_CACHE", str(next((tmp_path / "photos").rglob("*.jpg"))))
    with pytest.raises(UserError, match="the cache .* cannot be written.*KILOBATCH_CACHE"):
        prepare(spec, "train")


def test_one_folder_is_converted_once_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KILOBATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for split in ("train", "val"):
        photos(tmp_path / "photos" / split, 4)
    names: list[tuple[str, Split]] = [("photos", "train"), ("folder:photos/train", "train"), ("./photos/train", "test")]
    assert len({prepare(spec, split) for spec, split in [*names, (f"folder:{tmp_path}/photos/train", "train")]}) == 1
    assert prepare("photos", "test") not in {prepare("photos", "train")}


def test_a_conversion_tells_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second passes with each image, and many with the first: its loop is compiled. They tell nothing of the rest."""
    clock = iter([0, *range(60, 1000)])
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with progress_bar(100, tmp_path / "train.beton", progress=True) as advance:
        for _ in range(25):
            advance(1)
    assert capsys.readouterr().err.splitlines() == [
        f"converting 100 images to {tmp_path}/train.beton",
        "train.beton: 1 of 100 images",
        "train.beton: 11 of 100 images, 1 images/s, 89 s to go",
        "train.beton: 21 of 100 images, 1 images/s, 79 s to go",
    ]
