"""Walk through a folder: each file is taken, or passed over for a reason, and the two add up to what is there."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kilobatch.data.errors import UserError
from kilobatch.data.sources import walk_cache
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.folder import Folder
from kilobatch.data.sources.image_files import BrokenImage
from kilobatch.data.sources.listing import TRIED_TOGETHER
from kilobatch.data.sources.specs import count_classes, count_images, open_source
from kilobatch.data.sources.walk import SAID, PathList, describe_passed_over, walk


def image(path: Path, value: int = 0, side: int = 8, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (value, value, value)).save(path, format=kind)


def text(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("no image")


def found(root: Path) -> int:
    """All entries below a folder that are no folders, nor links to some."""
    return sum(len(files) for _, _, files in os.walk(root, followlinks=True))


def test_every_file_is_taken_or_counted(tmp_path: Path):
    for name in ("cat/a.png", "cat/deep/b.JPG", "dog/c.png"):
        image(tmp_path / name)
    for name in ("cat/no_suffix", "dog/wrong.txt", "dog/very.odd name"):
        image(tmp_path / name)
    for name in (".git/config", ".git/objects/aa/b", "cat/._a.png", "dog/.DS_Store"):
        text(tmp_path / name)
    image(tmp_path / ".git" / "logo.png")
    for name in ("@eaDir/cat.png/SYNOPHOTO_THUMB_M.jpg", "cat/@eaDir/a.png/b.jpg", "__MACOSX/cat/a.png"):
        image(tmp_path / name)
    for name in ("#recycle/a.png", "$RECYCLE.BIN/S-1/b.png", "dog/System Volume Information/c.png", "lost+found/#1"):
        image(tmp_path / name)
    for name in ("cat/Thumbs.db", "cat/deep/desktop.ini", "dog/notes.txt", "README"):
        text(tmp_path / name)
    image(tmp_path / "cover.jpg")
    image(tmp_path / "cover")
    source = Folder(tmp_path, "train")
    assert source.classes == ["cat", "dog"]
    assert source.names == [
        "cat/a.png", "cat/no_suffix", "cat/deep/b.JPG", "dog/c.png", "dog/very.odd name", "dog/wrong.txt",
    ]  # fmt: skip
    assert {reason: count for reason, count in source.passed_over.items() if "not images" not in reason} == {
        "hidden files": 5, "files in @eaDir": 2, "files in __MACOSX": 1, "files in #recycle": 1,
        "files in $RECYCLE.BIN": 1, "files in System Volume Information": 1, "files in lost+found": 1,
        "Thumbs.db": 1, "desktop.ini": 1, "images outside the class folders": 2,
    }  # fmt: skip
    assert sum(count for reason, count in source.passed_over.items() if "not images" in reason) == 2
    assert len(source) + sum(source.passed_over.values()) == found(tmp_path)


def test_many_files_are_tried_by_content_and_labels_follow(tmp_path: Path):
    for i in range(TRIED_TOGETHER + 10):  # more than one thread's task
        (image if i % 3 else text)(tmp_path / "ant" / f"{i:03}")
        image(tmp_path / "bee" / f"{i:03}.png")
    done = walk(tmp_path)
    ants = [f"ant/{i:03}" for i in range(TRIED_TOGETHER + 10) if i % 3]
    assert [done.files[i] for i in range(len(ants))] == ants
    assert done.labels.tolist() == [0] * len(ants) + [1] * (TRIED_TOGETHER + 10)
    assert len(done.files) + sum(done.passed_over.values()) == found(tmp_path)


def test_pipes_sockets_and_links_to_them_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    image(tmp_path / "cat" / "a.png")
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    os.mkfifo(tmp_path / "cat" / "pipe")
    (tmp_path / "cat" / "zero.png").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path / "cat")  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("s.png")
        source = Folder(tmp_path, "train")
    assert source.names == ["cat/a.png"] and source.passed_over == {"not regular files": 4}


def test_links_are_followed_but_not_back(tmp_path: Path):
    root = tmp_path / "root"
    image(root / "cat" / "deep" / "a.png")
    image(tmp_path / "elsewhere" / "b.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "deep" / "c.png").symlink_to(tmp_path / "elsewhere" / "b.png")
    # Back to the folder itself, to its class, to the root (where other classes lie) and above the root; in a circle.
    for name, target in (("l1", "."), ("l2", ".."), ("l3", "../.."), ("l4", "../../.."), ("l5", tmp_path)):
        (root / "cat" / "deep" / name).symlink_to(target)
    (tmp_path / "elsewhere" / "back").symlink_to(root / "cat")
    source = Folder(root, "train")
    assert source.names == ["cat/deep/a.png", "cat/deep/c.png", "dog/b.png", "dog/back/deep/a.png",
                                "dog/back/deep/c.png"]  # fmt: skip
    assert source.passed_over == {"links back to a folder above": 10}


def test_links_that_lead_nowhere_are_broken_images(tmp_path: Path):
    root = tmp_path / "in"
    for i in range(3):
        image(root / "cat" / f"{i}.png")
        image(root / "dog" / f"{i}.png")
    (root / "dog" / "x.png").symlink_to("/nowhere/x.png")
    (root / "dog" / "y").symlink_to("/nowhere/y")
    (root / "dog" / "self.png").symlink_to("self.png")
    (root / "dog" / "through.png").symlink_to("0.png/inside")
    (root / "Felis sp. 2").symlink_to("/nowhere/owl")  # it may have been a class folder
    (root / "dog" / "notes.txt").symlink_to("/nowhere/notes.txt")
    (root / "cat" / "1.png").unlink()
    (root / "cat" / "1.png").write_text("no image")
    source = Folder(root, "train")
    assert source.classes == ["cat", "dog"] and source.passed_over == {"links that lead nowhere (.txt)": 1}
    assert source.fingerprint() and len(source) + 1 == found(root)
    with pytest.raises(UserError, match="6 of 11 images are broken") as caught:
        convert(source, tmp_path / "a.beton", progress=False)
    broken = [
        f"{root}/Felis sp. 2 is a link to /nowhere/owl, which does not exist",
        f"{root}/cat/1.png: not an image",
        f"{root}/dog/self.png is a link to self.png, and by that to itself",
        f"{root}/dog/through.png is a link to {root}/dog/0.png/inside, which does not exist",
        f"{root}/dog/x.png is a link to /nowhere/x.png, which does not exist",
        f"{root}/dog/y is a link to /nowhere/y, which does not exist",
    ]
    assert all(line in str(caught.value) for line in broken)
    info = convert(source, tmp_path / "a.beton", skip_broken=True, progress=False)
    assert info.samples == 5 and all(any(line in one for one in info.skipped) for line in broken)


def test_a_link_that_led_nowhere_gets_no_class_by_guess(tmp_path: Path):
    root = tmp_path / "in"
    image(root / "cat" / "a.png")
    (root / "b.png").symlink_to(tmp_path / "b.png")
    source = Folder(root, "train")
    image(tmp_path / "b.png")  # its disk is mounted now, but it lies in no class folder
    for read in (lambda: source[0], lambda: convert(source, tmp_path / "a.beton", progress=False)):
        with pytest.raises(UserError, match=r"b.png was a link that leads nowhere"):
            read()


def test_a_file_that_disappears_is_a_broken_image_and_a_disks_fault_is_not(tmp_path: Path, monkeypatch):
    image(tmp_path / "cat" / "a.png")
    image(tmp_path / "cat" / "b.png")
    source = Folder(tmp_path, "train")
    before = source.fingerprint()
    (tmp_path / "cat" / "b.png").unlink()
    with pytest.raises(BrokenImage, match=r"cat/b.png cannot be read: No such file.*it was there"):
        source[1]
    assert source.fingerprint() != before
    (tmp_path / "cat" / "b.png").mkdir()
    with pytest.raises(BrokenImage, match=r"cat/b.png cannot be read: Is a directory"):
        source[1]
    (tmp_path / "cat" / "a.png").unlink()
    (tmp_path / "cat" / "a.png").symlink_to("/proc/self/mem")  # read(2) gives EIO there
    with pytest.raises(UserError, match=r"a.png cannot be read: Input/output error; check its perm") as caught:
        source[0]
    assert not isinstance(caught.value, BrokenImage)


def test_folders_that_are_not_there(tmp_path: Path):
    image(tmp_path / "cat" / "a.png")
    (tmp_path / "gone").symlink_to("/nowhere/photos")
    (tmp_path / "loop").symlink_to("loop")
    for spec, says in (
        (f"folder:{tmp_path}/gone", "gone is a link to /nowhere/photos, which does not exist; mount its disk"),
        (f"folder:{tmp_path}/loop", "loop is a link to loop, and by that to itself"),
        (f"folder:{tmp_path}/{'x' * 300}", "there is no such folder"),
        (f"folder:{tmp_path}/cat/a.png/below", "there is no such folder"),
        (f"folder:{tmp_path} ", "there is no such folder .but there is '.*', without the space"),
        ("folder:~nobody_of_this_name/photos", "there is no user 'nobody_of_this_name'.*write ./~nobody"),
        ("folder:a\0b", "has a character in its path that no path has"),
        ("folder: ", "names no path"),
    ):
        for ask in (open_source, count_images, count_classes):
            with pytest.raises(UserError, match=says):
                ask(spec, "train")


def test_a_class_of_other_files_says_what_they_are(tmp_path: Path):
    text(tmp_path / "cat" / "a.txt")
    with pytest.raises(UserError, match=r"class folder 'cat' has no images \(passed over: 1 not images.*\); fill or"):
        Folder(tmp_path, "train")
    (tmp_path / "cat" / "a.txt").unlink()
    (tmp_path / "cat").rmdir()
    (tmp_path / "dog").symlink_to("/nowhere/dog")
    with pytest.raises(UserError, match=r"has no images \(1 links in it lead nowhere, such as dog\)"):
        Folder(tmp_path, "train")


def test_the_fingerprint_sees_a_file_replaced_by_one_of_equal_size_and_time(tmp_path: Path):
    for name, value in (("a", 1), ("b", 2)):
        Image.new("RGB", (8, 8), (value, value, value)).save(tmp_path / f"{name}.bmp")
        os.utime(tmp_path / f"{name}.bmp", ns=(10**18, 10**18))
    (tmp_path / "in" / "cat").mkdir(parents=True)
    place = tmp_path / "in" / "cat" / "a.bmp"
    (tmp_path / "a.bmp").rename(place)
    seen = {Folder(tmp_path / "in", "train").fingerprint() for _ in range(2)}
    (tmp_path / "b.bmp").rename(place)
    seen.add(Folder(tmp_path / "in", "train").fingerprint())
    data = place.read_bytes()
    place.write_bytes(data[:-1] + b"\7")  # in place: the inode stays
    os.utime(place, ns=(10**18, 10**18))
    seen.add(Folder(tmp_path / "in", "train").fingerprint())
    text(tmp_path / "in" / "notes.txt")  # one more that is passed over
    seen.add(Folder(tmp_path / "in", "train").fingerprint())
    assert len(seen) == 4


def test_a_folder_is_walked_through_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    walks: list[Path] = []
    monkeypatch.setattr(walk_cache, "walk", lambda root: walks.append(root) or walk(root))
    spec = f"folder:{tmp_path}"
    image(tmp_path / "cat" / "deep" / "a.png")
    assert count_images(spec, "train") == count_classes(spec, "train") == 1
    assert len(walks) == 2  # it has changed too recently to be sure that it changes no more
    monkeypatch.setattr(walk_cache, "SETTLED", -(10**12))
    for ask in (count_images, count_classes, open_source, open_source):
        ask(spec, "train")
    assert len(walks) == 3
    for change in (
        lambda: image(tmp_path / "cat" / "deep" / "b.png"),
        lambda: (tmp_path / "cat" / "deep" / "a.png").rename(tmp_path / "cat" / "deep" / "c.png"),
        lambda: (tmp_path / "cat" / "deep").rename(tmp_path / "cat" / "other"),
        lambda: image(tmp_path / "dog" / "a.png"),
    ):
        before = open_source(spec, "train").names
        change()
        after = open_source(spec, "train").names
        assert after != before and after == [
            path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*.png"))
        ]
    monkeypatch.setattr(walk_cache, "LONGEST", 0)
    already = len(walks)
    assert count_images(spec, "train") == 3 and len(walks) == already + 1


def test_paths_in_one_piece():
    paths, names = PathList(), ["a/b.png", "", "日本/é", os.fsdecode(b"\xff")]
    for name in names:
        paths.append(name)
    assert [paths[i] for i in range(len(paths))] == list(paths) == names
    for outside in (-1, 4):
        with pytest.raises(IndexError):
            paths[outside]


def test_reasons_are_said_on_one_line_that_ends(tmp_path: Path):
    """Suffixes may hold anything, and of files that are numbered behind a dot each has its own."""
    image(tmp_path / "cat" / "a.png")
    for name in (b"a.\xff", b"a.\n", b"a.\x1b[31m", *(b"a.%d" % i for i in range(40))):
        text(tmp_path / "cat" / os.fsdecode(name))
    passed_over = walk(tmp_path).passed_over
    assert passed_over.keys() >= {r"not images (.\udcff)", r"not images (.\n)", r"not images (.\u001b[31m)"}
    said = describe_passed_over(passed_over)
    assert (
        said.isprintable() and said.count(", ") == SAID and said.endswith(f"{43 - SAID} for {43 - SAID} other reasons")
    )
    assert sum(passed_over.values()) + 1 == found(tmp_path)


def test_a_raw_file_of_a_camera_is_not_its_preview(tmp_path: Path):
    image(tmp_path / "cat" / "a.png")
    preview = Image.new("RGB", (80, 60))
    preview.save(tmp_path / "cat" / "b.nef", "TIFF", tiffinfo={254: 1})
    source = Folder(tmp_path, "train")
    assert (source.names, source.passed_over) == (["cat/a.png"], {"not images (.nef)": 1})
    (tmp_path / "cat" / "b.nef").rename(tmp_path / "cat" / "b.tif")
    with pytest.raises(UserError, match=r"b\.tif: the first picture in it is a preview of another, as in raw files"):
        convert(Folder(tmp_path, "train"), tmp_path / "a.beton", progress=False)


def test_numbers_are_not_taken_for_tga(tmp_path: Path):
    """TGA has no first bytes of its own. Without an image's suffix it is known by its last ones, or by its size."""
    image(tmp_path / "cat" / "a.png")
    numbers = np.array([10, 3, 10, 11, 2, 2, 8, 9, 1, 4] + 500 * [3], np.uint16)  # of 8 by 9 pixels, would Pillow say
    (tmp_path / "cat" / "numbers.bin").write_bytes(numbers.tobytes())
    huge = bytes([0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 8, 0]) + bytes(500)
    (tmp_path / "cat" / "huge.bin").write_bytes(huge)
    assert Folder(tmp_path, "train").names == ["cat/a.png"]
    pixels = Image.new("RGB", (9, 7))
    for mode in ("RGB", "RGBA", "L", "LA", "P", "1"):
        pixels.convert(mode).save(tmp_path / "cat" / f"new {mode}", "TGA")
        (tmp_path / "cat" / f"old {mode}").write_bytes((tmp_path / "cat" / f"new {mode}").read_bytes()[:-26])
    assert len(Folder(tmp_path, "train")) == 1 + 2 * 6
    pixels.save(tmp_path / "cat" / "compressed", "TGA", compression="tga_rle")
    assert len(Folder(tmp_path, "train")) == 2 + 2 * 6
