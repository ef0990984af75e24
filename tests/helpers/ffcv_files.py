""".beton files by FFCV's own writer, with any fields in any order."""

from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.loaders import photo

IMAGES = 12
MORE = {"score": 0.5, "text": {"a": "b"}, "bytes": np.arange(3, dtype=np.uint8), "array": np.ones(4, np.float32)}


class Values:
    """A data set as FFCV's writer takes it: a tuple of the fields' values for each image."""

    def __init__(self, names: list[str], side: int):
        self.names, self.side = names, side

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        i = int(i)
        values = MORE | {"image": photo(i, self.side + i, self.side), "label": i // 4, "other": 7 - i}
        return tuple(values[name] if name in values else values["label"] for name in self.names)


def ffcv_file(path: Path, names: list[str], mode: str = "jpg", side: int = 70, **options: Any) -> Path:
    """Writes a file by FFCV's own writer, which uses processes."""
    from ffcv.fields import BytesField, FloatField, IntField, JSONField, NDArrayField, RGBImageField
    from ffcv.writer import DatasetWriter

    more = {
        "score": FloatField(),
        "text": JSONField(),
        "bytes": BytesField(),
        "array": NDArrayField(np.dtype("f4"), (4,)),
        "image": RGBImageField(mode),
    }
    fields = {name: more.get(name, IntField()) for name in names}
    DatasetWriter(str(path), fields, num_workers=1, **options).from_indexed_dataset(Values(names, side))
    return path
