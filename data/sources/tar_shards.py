"""Source tar:PATTERN: archives as WebDataset writes them, whose members of one sample have one key.

A key is a member's path up to the first dot of its last part; the rest is its kind, as in KEY.jpg, KEY.cls, KEY.json.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from kilobatch.data.errors import UserError
from kilobatch.data.sources.encoded_files import EncodedFiles, digest_of_files
from kilobatch.data.sources.file_patterns import files_of_pattern, names_of_option
from kilobatch.data.sources.formats import IMAGE_SUFFIXES
from kilobatch.data.sources.image_files import BrokenImage
from kilobatch.data.sources.label_names import (
    NO_LABEL,
    LabelNames,
    LabelOption,
    Labels,
    numbered_classes,
    unlabelled,
)
from kilobatch.data.sources.listing import HIDDEN, cannot_be_read
from kilobatch.data.sources.open_cache import opened_once
from kilobatch.data.sources.path_list import PathList
from kilobatch.data.sources.path_names import printable
from kilobatch.data.sources.tar_index import Member, tar_members
from kilobatch.data.sources.walk import also_passed_over

CLASS, CLASS_NAME, JSON = "cls", "cls.txt", "json"
NAME_KEYS = ("class_name", "label_name", "class")  # of a .json that names the class of a .cls
LARGEST_LABEL = 1 << 20  # bytes of a label's member


class TarShards(EncodedFiles):
    """Images in WebDataset's shards, each named SHARD/KEY.jpg; both splits have all.

    label: the kind of the members that have labels: numbers, or names of classes; a regular expression with one group,
    searched in the image's name; `none`; None: `cls`, or else `cls.txt`. Names of the classes of numbers stand in
    `classes`, a text file of a name in each line; else in KEY.cls.txt, or in KEY.json under class_name, label_name or
    class; else they are the numbers. image: the kind of the images, where samples have several.
    Raises UserError where shards are absent, compressed or damaged, and where there is no image.
    """

    passed_over: Mapping[str, int]

    def __init__(self, where: str, shards: list[Path], label: str | None, image: str | None, names: list[str] | None):
        self.where, self.shards = where, shards
        self._files, self._starts, self._sizes = PathList(), array("q"), array("q")
        self._shard, self._passed, self._image = array("i"), Counter[str](), image
        option = LabelOption(label, where)
        self._kinds = (
            () if not option.own else (CLASS, CLASS_NAME, JSON) if label is None else (label, CLASS_NAME, JSON)
        )
        self._texts: dict[str, LabelNames] = {kind: LabelNames() for kind in self._kinds[:2]}
        self._names: dict[str, str] = {}  # of the classes of numbers
        for number, shard in enumerate(shards):
            self._read_shard(number, shard)
        self.passed_over = dict(self._passed.most_common())
        if not len(self._files):
            others = also_passed_over(self.passed_over)
            raise UserError(f"{where} has no images{others}; give shards with members such as KEY.jpg and KEY.cls")
        self.classes, self._labels = option.apply(self._files, lambda: self._read_labels(label, names))
        del self._texts, self._names

    def _read_shard(self, number: int, shard: Path) -> None:
        sample: list[Member] = []
        key = None
        for member in tar_members(shard):
            folder, _, last = member.name.rpartition("/")
            if not member.regular or last.startswith("."):
                self._passed[HIDDEN if last.startswith(".") else "not regular files"] += 1
                continue
            this = (folder, last.partition(".")[0])
            if sample and this != key:
                self._take_sample(number, shard, sample)
                sample = []
            key = this
            sample.append(member)
        if sample:
            self._take_sample(number, shard, sample)

    def _take_sample(self, number: int, shard: Path, members: list[Member]) -> None:
        kinds = [member.name.rpartition("/")[2].partition(".")[2].lower() for member in members]
        image = None
        labels: dict[str, Member] = {}
        others: list[str] = []
        for member, kind in zip(members, kinds, strict=True):
            suffix = f".{kind.rpartition('.')[2]}"
            if kind in self._kinds:
                labels[kind] = member
            elif suffix not in IMAGE_SUFFIXES or (self._image is not None and kind != self._image):
                others.append(
                    f"not images ({suffix})" if suffix not in IMAGE_SUFFIXES else f"images other than .{self._image}"
                )
            elif image is not None:
                others.append("further images of a sample")
            else:
                image = member
        if image is None:
            self._passed.update([*others, *["labels without an image"] * len(labels)])
            return
        self._passed.update(others)
        self._files.append(f"{shard.name}/{image.name}")
        self._starts.append(image.start)
        self._sizes.append(image.size)
        self._shard.append(number)
        texts = {kind: self._text(shard, member) for kind, member in labels.items()}
        for kind, found in self._texts.items():
            found.append(texts.get(kind))
        self._learn_name(texts)

    def _text(self, shard: Path, member: Member) -> str:
        if member.size > LARGEST_LABEL:
            raise UserError(f"{shard}: {printable(member.name)} has {member.size:,} bytes, too many for a label")
        data = _read(shard, member.start, member.size)
        try:
            return data.decode().strip()
        except UnicodeDecodeError:
            raise UserError(f"{shard}: {printable(member.name)} is no text; use label=none, or another label") from None

    def _learn_name(self, texts: Mapping[str, str]) -> None:
        """Notes the name of a number's class where the sample says it."""
        number = texts.get(self._kinds[0]) if self._kinds else None
        if number is None or number in self._names:
            return
        name = texts.get(CLASS_NAME) or _name_in_json(texts.get(JSON, ""))
        if name:
            self._names[number] = name

    def _read_labels(self, label: str | None, names: list[str] | None) -> Labels:
        texts = [(kind, *found.finish()) for kind, found in self._texts.items()]
        kind, written, labels = next((found for found in texts if found[1]), texts[0])
        if not written:
            if label is None:
                return unlabelled(len(self._files))
            raise UserError(f"{self.where}: no image has a member KEY.{label}; correct label, or use label=none")
        if kind == CLASS_NAME or not all(text.removeprefix("-").isdigit() for text in written):
            return written, labels  # names of classes
        numbers = np.array([*map(int, written), NO_LABEL], np.int64)[labels]
        if names is None and self._names:
            highest = max(map(int, written))
            names = [self._names.get(str(number), str(number)) for number in range(highest + 1)]
        return numbered_classes(numbers, names, self.where), numbers.astype(np.int32)

    def fingerprint(self) -> str:
        digest = digest_of_files(Path(), (str(shard.absolute()) for shard in self.shards))
        digest.update(repr((self.classes, self._image)).encode(errors="surrogateescape"))
        digest.update(self._labels.data)
        return digest.hexdigest()

    def _bytes(self, i: int) -> tuple[str, bytes]:
        shard, size = self.shards[self._shard[i]], self._sizes[i]
        name = f"{shard}: {printable(self._files[i].partition('/')[2])}"
        data = _read(shard, self._starts[i], size)
        if len(data) < size:
            raise BrokenImage(f"{name} is cut short: the shard was whole when it was opened")
        return name, data


def open_tar(pattern: Path, options: Mapping[str, str]) -> TarShards:
    """tar:PATTERN. Raises UserError."""
    where = f"tar:{pattern}"
    shards = files_of_pattern("tar", pattern, (".tar",))
    names = names_of_option(where, shards, options)
    label, image = options.get("label"), options.get("image")
    return opened_once(
        TarShards,
        shards,
        lambda: TarShards(where, shards, label, None if image is None else image.lower().lstrip("."), names),
        *sorted(options.items()),
        *(names or ()),
    )


def _read(shard: Path, start: int, size: int) -> bytes:
    try:
        descriptor = os.open(shard, os.O_RDONLY)
        try:
            return os.pread(descriptor, size, start)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise cannot_be_read(shard, error) from error


def _name_in_json(text: str) -> str | None:
    """The name of a class in a sample's .json."""
    try:
        content = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return None
    found: Iterable[object] = (content.get(key) for key in NAME_KEYS) if isinstance(content, dict) else ()
    return next((name for name in found if isinstance(name, str) and name), None)
