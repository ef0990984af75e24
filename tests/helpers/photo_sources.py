"""The same photographs as every kind of source has them: a tree, a list, a table, shards, Parquet, a saved data set."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ["ant", "bee", "cat"]
Photo = tuple[str, bytes, int]  # path, a JPEG's bytes, label
FEATURES = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}


def synthetic_photos(images: int = 12, side: int = 70) -> list[Photo]:
    """Photographs in the order of their paths, each in the folder of its class."""
    random = np.random.default_rng(0)
    found: list[Photo] = []
    for i in range(images):
        label = i * len(CLASSES) // images
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), np.uint8))
        file = io.BytesIO()
        coarse.resize((side + 10, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
        found.append((f"{CLASSES[label]}/{i:03}.jpg", file.getvalue(), label))
    return found


def write_tree(root: Path, photos: list[Photo]) -> None:
    for path, data, _ in photos:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def write_lists(root: Path, photos: list[Photo], classes: list[str]) -> None:
    """train.txt and train.csv, beside the tree."""
    rows = [(path, classes[label]) for path, _, label in photos]
    (root / "train.txt").write_text("".join(f"{path}\t{name}\n" for path, name in rows))
    (root / "train.csv").write_text("path,label\n" + "".join(f'"{path}","{name}"\n' for path, name in rows))


def add_member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_shards(root: Path, photos: list[Photo], classes: list[str], each: int = 5) -> None:
    """shard-0.tar and others, as WebDataset's ShardWriter has written them: members of one key one after another."""
    for number, start in enumerate(range(0, len(photos), each)):
        with tarfile.open(root / f"shard-{number}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for i, (_, data, label) in enumerate(photos[start : start + each], start):
                add_member(archive, f"{i:06}.cls", str(label).encode())
                add_member(archive, f"{i:06}.jpg", data)
                add_member(archive, f"{i:06}.json", json.dumps({"class_name": classes[label]}).encode())


def photo_table(photos: list[Photo], classes: list[str]) -> Any:
    """A table with Hugging Face's columns and metadata."""
    import pyarrow as arrow

    features = {**FEATURES, "label": {"names": classes, "_type": "ClassLabel"}}
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    schema: Any = arrow.schema(
        [("image", image), ("label", arrow.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    cells = [{"bytes": data, "path": path} for path, data, _ in photos]
    return arrow.table([arrow.array(cells, image), arrow.array([label for *_, label in photos])], schema=schema)


def write_parquet(root: Path, photos: list[Photo], classes: list[str], group: int = 4) -> None:
    """part-0.parquet and part-1.parquet."""
    from pyarrow import parquet

    half = len(photos) // 2 + 1
    for number, part in enumerate((photos[:half], photos[half:])):
        parquet.write_table(photo_table(part, classes), root / f"part-{number}.parquet", row_group_size=group)


def write_saved(folder: Path, photos: list[Photo], classes: list[str]) -> None:
    """A split as save_to_disk has written it, in two files of Arrow's stream."""
    import pyarrow as arrow

    folder.mkdir(parents=True, exist_ok=True)
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    half = len(photos) // 2
    for name, part in zip(names, (photos[:half], photos[half:]), strict=True):
        table = photo_table(part, classes)
        with arrow.OSFile(str(folder / name), "wb") as file, arrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=3)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": folder.name}
    (folder / "state.json").write_text(json.dumps(state))
