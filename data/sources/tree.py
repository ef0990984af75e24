"""Source tree:PATH: a folder of images at any depth; labels by the folder in PATH, by a regular expression, or none."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kilobatch.data.errors import UserError
from kilobatch.data.sources.encoded_files import EncodedFiles, digest_of_files, read_file_of_source
from kilobatch.data.sources.folder import folder_names, folder_of_split
from kilobatch.data.sources.label_names import NO_LABEL, LabelOption, Labels
from kilobatch.data.sources.path_names import existing_path
from kilobatch.data.sources.splits import Split
from kilobatch.data.sources.walk import Walk, also_passed_over
from kilobatch.data.sources.walk_cache import walk_once

FOLDER = "folder"  # the value of the option `label` that is its default


class Tree(EncodedFiles):
    """All images below PATH. label: `folder`: the class is the folder in PATH that the image lies in, at any depth, and
    an image beside these folders has none; a regular expression with one group, searched in the path within PATH: the
    class is what the group matches; `none`.

    Where PATH holds folders that are named after splits, that of the split is read, as of folder:. Files are taken and
    counted as there, but that images lie anywhere and that a folder without an image is no class. path: the folder that
    is read. Raises UserError where there is no image, and for an option that cannot be used.
    """

    def __init__(self, path: Path, split: Split, label: str = FOLDER) -> None:
        where = f"tree:{path}"
        option = LabelOption(label, where)
        if option.own and label != FOLDER:
            raise UserError(
                f"{where}: label is '{label}'; use folder, none, or a regular expression with one group, as in "
                "label=([^/]+)/[^/]+$"
            )
        self.path = folder_of_split(existing_path(path), split, "tree")
        walk = walk_once(self.path, tree=label != FOLDER)
        self._files, self.passed_over = walk.files, dict(walk.passed_over.most_common())
        if not len(walk.files):
            others = also_passed_over(self.passed_over)
            raise UserError(f"{where} has no images{others}; give a folder that holds images, at any depth")
        self.classes, self._labels = option.apply(walk.files, lambda: self._labels_by_folder(walk))

    passed_over: Mapping[str, int]

    def _labels_by_folder(self, walk: Walk) -> Labels:
        """Folders without an image are no classes."""
        images = np.bincount(walk.labels + 1, minlength=len(walk.classes) + 1)[1:]
        present = np.flatnonzero(images)
        classes = folder_names(self.path, [walk.classes[i] for i in present], "tree")
        place = np.full(len(walk.classes) + 1, NO_LABEL, np.int32)  # the last one is that of NO_CLASS, which is -1
        place[present] = np.arange(len(present))
        return classes, place[walk.labels]

    def fingerprint(self) -> str:
        digest = digest_of_files(self.path, self._files)
        digest.update(repr((sorted(self.passed_over.items()), self.classes)).encode(errors="surrogateescape"))
        digest.update(self._labels.data)
        return digest.hexdigest()

    def _bytes(self, i: int) -> tuple[str, bytes]:
        return read_file_of_source(self.path / self._files[i])
