"""Lists of paths in one piece of memory, and the names of images that are made of them when they are asked for."""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from kilobatch.data.sources.path_names import escaped


class PathList:
    """Paths in one piece of memory: a million take 40 MB rather than 110 as a list."""

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._text, self._ends = bytearray(), array("q", [0])
        for path in paths:
            self.append(path)

    def append(self, path: str) -> None:
        self._text += os.fsencode(path)
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(bytes(self._text[self._ends[i] : self._ends[i + 1]]))


class MadeNames(Sequence[str]):
    """Names that are made when they are asked for; a subclass has `__len__` and `name`. Equal to a list of the same
    texts."""

    def name(self, i: int) -> str:
        """The name of number i, from 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, i: int) -> str: ...

    @overload
    def __getitem__(self, i: slice) -> list[str]: ...

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self.name(k) for k in range(*i.indices(len(self)))]
        return self.name(range(len(self))[i])  # which counts a negative one from the end, and refuses one too large

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))  # noqa: B905

    __hash__ = None  # pyright: ignore[reportAssignmentType] - as a list


class ImageNames(MadeNames):
    """Names of images, each on one line: backslashes, control characters and bytes that are not UTF-8 are escaped, so
    that two names are never the same text."""

    def __init__(self, paths: PathList) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, i: int) -> str:
        return escaped(self._paths[i])
