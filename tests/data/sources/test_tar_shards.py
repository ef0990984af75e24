"""tar:PATTERN: patterns of shards, members of one key, labels and their names; what is refused."""

import io
import tarfile
from pathlib import Path

import pytest

from kilobatch.data.errors import UserError
from kilobatch.data.sources.specs import open_source
from kilobatch.data.sources.tar_index import tar_members
from tests.helpers.photo_sources import add_member, synthetic_photos

JPEG = synthetic_photos(1, side=20)[0][1]


def write(path: Path, members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members.items():
            add_member(archive, name, data)


def test_labels_are_numbers_or_names(tmp_path: Path):
    def opened(members: dict[str, bytes], options: str = "") -> tuple[list[str], list[int]]:
        write(tmp_path / "a.tar", members)
        source = open_source(f"tar:{tmp_path}/a.tar{options}", "train")
        return source.classes, source.labels.tolist()

    (tmp_path / "names.txt").write_text("ant\nbee\ncat\n")
    numbers = {
        "0.jpg": JPEG,
        "0.cls": b"2",
        "1.cls": b" 0\n",
        "1.jpg": JPEG,
        "2.jpg": JPEG,
        "3.cls": b"-1",
        "3.jpg": JPEG,
    }
    assert opened(numbers) == (["0", "1", "2"], [2, 0, -1, -1])
    assert opened(numbers, "?classes=names.txt") == (["ant", "bee", "cat"], [2, 0, -1, -1])
    assert opened(numbers, "?label=none") == ([], [-1] * 4)
    named = {**numbers, "1.cls.txt": b"bird", "2.json": b'{"class_name": "unused"}'}
    assert opened(dict(sorted(named.items()))) == (["bird", "1", "2"], [2, 0, -1, -1])
    words = {"0.jpg": JPEG, "0.cls.txt": b"zebra", "1.jpg": JPEG, "1.cls.txt": b"ant"}
    assert opened(words) == (["ant", "zebra"], [1, 0])
    assert opened({"0.jpg": JPEG, "0.kind": b"owl"}, "?label=kind") == (["owl"], [0])
    assert opened({"cat/0.jpg": JPEG, "dog/0.jpg": JPEG}, "?label=/(.*)/") == (["cat", "dog"], [0, 1])


def test_members_are_taken_or_counted(tmp_path: Path):
    members = {"a/0.jpg": JPEG, "a/0.seg.png": JPEG, "a/0.txt": b"words", "a/._0.jpg": b"", "b/0.json": b"{}"}
    write(tmp_path / "a.tar", members)
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for name, kind in (("folder", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type = kind
            archive.addfile(member)
    source = open_source(f"tar:{tmp_path}/a.tar", "train")
    assert source.names == ["a.tar/a/0.jpg"] and source.passed_over == {
        "further images of a sample": 1, "not images (.txt)": 1, "hidden files": 1, "labels without an image": 1,
        "not regular files": 1,
    }  # fmt: skip
    assert open_source(f"tar:{tmp_path}/a.tar?image=seg.png", "train").names == ["a.tar/a/0.seg.png"]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_standard_library(form: int, tmp_path: Path):
    names = [
        "a.jpg",
        "d" * 90 + "/" + "e" * 60 + ".jpg",
        *([] if form == tarfile.USTAR_FORMAT else ["é" * 150 + ".jpg"]),
    ]
    write(tmp_path / "a.tar", {name: bytes([i]) * (700 * i) for i, name in enumerate(names)}, form)
    with tarfile.open(tmp_path / "a.tar") as archive:
        expected = [(member.name, member.offset_data, member.size) for member in archive]
    assert [member[:3] for member in tar_members(tmp_path / "a.tar")] == expected


def test_patterns_name_shards_in_order(tmp_path: Path):
    for number in (8, 9, 10, 11):
        write(tmp_path / f"s-{number:02}.tar", {f"{number}.jpg": JPEG})
    write(tmp_path / "{odd}.tar", {"x.jpg": JPEG})

    def names(pattern: str) -> list[str]:
        return [name.partition("/")[2] for name in open_source(f"tar:{tmp_path}/{pattern}", "train").names or []]

    assert names("s-{08..10}.tar") == ["8.jpg", "9.jpg", "10.jpg"]
    assert names("s-{11,08}.tar") == ["11.jpg", "8.jpg"]
    assert names("s-0?.tar") == names("s-0[89].tar") == names("s-{08..09}.tar") == ["8.jpg", "9.jpg"]
    assert names("{odd}.tar") == ["x.jpg"]
    assert names(".") == ["8.jpg", "9.jpg", "10.jpg", "11.jpg", "x.jpg"]


REFUSED = {
    "s-{000..002}.tar": ("there is no file", "s-001.tar", "correct the pattern"),
    "x*.tar": ("there is no file", "x*.tar"),
    "{9..1}.tar": ("{9..1} should go from a number to a higher one",),
    "{a}.tar": ("{a} stands for nothing",),
    "none": ("there is no file",),
    "empty": ("is a folder without a .tar file",),
    "zipped.tar": ("is compressed (gzip)", "decompress it"),
    "text.tar": ("is not a .tar file",),
    "cut.tar": ("is cut short", "copy it again"),
    "flipped.tar": ("is damaged or cut short: byte 1,024 begins no member",),
    "words.tar": ("has no images", "not images (.txt)"),
    "s-000.tar?label=kind": ("no image has a member KEY.kind",),
    "s-000.tar?classes=few.txt": ("there are 1 names of classes, but the labels go up to 1",),
    "s-000.tar?classes=none.txt": ("none.txt cannot be read",),
    "s-000.tar?size=3": ("tar: has no option 'size'",),
}


@pytest.mark.parametrize("spec", REFUSED)
def test_shards_are_refused(spec: str, tmp_path: Path):
    two = {"0.jpg": JPEG[:500], "0.cls": b"1", "1.jpg": JPEG}
    write(tmp_path / "s-000.tar", two)
    write(tmp_path / "s-002.tar", two)
    write(tmp_path / "words.tar", {"a.txt": b"words"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "few.txt").write_text("ant\n")
    whole = (tmp_path / "s-000.tar").read_bytes()
    (tmp_path / "text.tar").write_text("no archive")
    (tmp_path / "cut.tar").write_bytes(whole[:600])
    (tmp_path / "flipped.tar").write_bytes(whole[:1024] + b"x" + whole[1025:])
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        add_member(archive, "a.jpg", JPEG)
    (tmp_path / "zipped.tar").write_bytes(file.getvalue())
    expected = REFUSED[spec]
    with pytest.raises(UserError) as caught:
        open_source(f"tar:{tmp_path}/{spec}", "train")
    assert all(part in str(caught.value) for part in expected), caught.value
