"""tree:, list: and csv:, which name images and labels in other ways than folders of classes; and options of specs."""

import os
from pathlib import Path

import pytest
from PIL import Image

from kilobatch.data.errors import UserError
from kilobatch.data.loading.labels import count_labelled
from kilobatch.data.loading.options import LabelOptions
from kilobatch.data.sources.image_files import BrokenImage
from kilobatch.data.sources.specs import absolute_spec, count_classes, count_images, labels_of, open_source, spec_at


def image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (value, value, value)).save(path)


def tree(root: Path) -> None:
    for value, name in enumerate(("top.png", "ant/a.png", "ant/wild/deep/b.png", "zebra/wild/c.png", "zebra/d.png")):
        image(root / name, value)
    (root / "notes.txt").write_text("no image")
    (root / "empty").mkdir()


def seen(spec: str) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Classes, names, and the first pixel and the label of each image; each count agrees with what is opened."""
    source = open_source(spec, "train")
    images = [(int(pixels[0, 0, 0]), label) for pixels, label in (source[i] for i in range(len(source)))]
    assert [label for _, label in images] == source.labels.tolist() == labels_of(spec, "train").tolist()
    assert count_images(spec, "train") == len(images) and count_classes(spec, "train") == len(source.classes)
    return source.classes, list(source.names or []), images


TREE = ["top.png", "ant/a.png", "ant/wild/deep/b.png", "zebra/d.png", "zebra/wild/c.png"]


@pytest.mark.parametrize(
    ("label", "classes", "labels"),
    [
        ("", ["ant", "zebra"], [-1, 0, 0, 1, 1]),
        ("?label=folder", ["ant", "zebra"], [-1, 0, 0, 1, 1]),
        ("?label=none", [], [-1] * 5),
        (r"?label=(?:^|/)(\w+)/[^/]+$", ["ant", "deep", "wild", "zebra"], [-1, 0, 1, 3, 2]),
        ("?label=([a-d])[.]png", ["a", "b", "c", "d"], [-1, 0, 1, 3, 2]),
    ],
)
def test_a_tree_has_labels_by_folder_by_expression_or_none(
    label: str, classes: list[str], labels: list[int], tmp_path: Path
):
    tree(tmp_path)
    found = seen(f"tree:{tmp_path}{label}")
    assert found == (classes, TREE, list(zip([0, 1, 2, 4, 3], labels, strict=True)))
    assert open_source(f"tree:{tmp_path}{label}", "train").passed_over == {"not images (.txt)": 1}


def test_a_tree_holds_splits_as_a_folder_does(tmp_path: Path):
    for name in ("train/a/x/1.png", "val/a/2.png"):
        image(tmp_path / name)
    for label in ("", "?label=none"):
        names = [open_source(f"tree:{tmp_path}{label}", split).names for split in ("train", "test")]
        assert names == [["a/x/1.png"], ["a/2.png"]]
    image(tmp_path / "other" / "site" / "train" / "1.png")
    image(tmp_path / "other" / "site" / "test" / "1.png")
    with pytest.raises(UserError, match="tree:.*the class folder 'site' holds splits .*give the folder above"):
        open_source(f"tree:{tmp_path}/other", "train")
    assert count_images(f"tree:{tmp_path}/other?label=none", "train") == 2  # any depth is asked for


def test_a_list_names_images_with_labels_or_without(tmp_path: Path):
    tree(tmp_path / "in")
    (tmp_path / "in" / "two words.png").symlink_to("ant/a.png")
    lines = ["\ufeffzebra/d.png\tzebra", "ant/a.png\tant\r", "", "two words.png", f"{tmp_path}/in/top.png\tant"]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    expected = (["ant", "zebra"], ["zebra/d.png", "ant/a.png", "two words.png", f"{tmp_path}/in/top.png"])
    assert seen(f"list:{tmp_path}/train.txt?root=in") == (*expected, [(4, 1), (1, 0), (1, -1), (0, 0)])
    assert seen(f"list:{tmp_path}/train.txt?root={tmp_path}/in&label=none")[0] == []
    assert seen(f"list:{tmp_path}/train.txt?root=in&label=^(ant)/")[0] == ["ant"]
    assert count_labelled(f"list:{tmp_path}/train.txt?root=in", LabelOptions()) == 3


def test_a_table_has_columns(tmp_path: Path):
    tree(tmp_path)
    rows = ["path,kind,age", "top.png,,9", 'ant/a.png,"ant, or so",10', "zebra/d.png,zebra,10"]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    names = ["top.png", "ant/a.png", "zebra/d.png"]
    assert seen(f"csv:{tmp_path}/train.csv") == ([], names, [(0, -1), (1, -1), (4, -1)])
    labelled = (["ant, or so", "zebra"], names, [(0, -1), (1, 0), (4, 1)])
    assert seen(f"csv:{tmp_path}/train.csv?label=kind") == labelled
    assert seen(f"csv:{tmp_path}/train.csv?label=age")[0] == ["9", "10"]  # as numbers
    (tmp_path / "train.tsv").write_text("\n".join(rows).replace("age", "label").replace(",", "\t").replace('"', ""))
    with pytest.raises(UserError, match=r"train.tsv line 3 has 4 columns, and the first line names 3; mend the line"):
        open_source(f"csv:{tmp_path}/train.tsv", "train")
    (tmp_path / "train.tsv").write_text("label\tfile\nant\tant/a.png\n")
    assert seen(f"csv:{tmp_path}/train.tsv?path=file") == (["ant"], ["ant/a.png"], [(1, 0)])


def test_an_image_that_a_list_names_and_that_is_absent_is_broken(tmp_path: Path):
    (tmp_path / "train.txt").write_text("no.png\tant\n")
    source = open_source(f"list:{tmp_path}/train.txt", "train")
    with pytest.raises(BrokenImage, match="no.png cannot be read: No such file or directory; .*train.txt names it"):
        source[0]


def test_a_list_is_read_again_where_it_has_changed_alone(tmp_path: Path):
    tree(tmp_path)
    file = tmp_path / "train.txt"
    file.write_text("top.png\n")
    os.utime(file, ns=(1, 1))
    spec = f"list:{file}"
    first = open_source(spec, "train")
    before = first.fingerprint()
    file.write_text("top.png\tant\n")
    second = open_source(spec, "train")
    assert second.classes == ["ant"] and second.fingerprint() != before == first.fingerprint()
    before = second.fingerprint()
    image(tmp_path / "ant" / "a.png", 7)  # another image
    assert open_source(spec, "train").fingerprint() == before
    image(tmp_path / "top.png", 7)
    assert open_source(spec, "train").fingerprint() != before


def test_specs_with_options_are_made_absolute_and_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for spec, path, options in (
        ("tree:in: a?label=(a|b)&c", "in: a", "?label=(a|b)&c"),
        ("list:a?b.txt?root=x&label=none", "a?b.txt", "?root=x&label=none"),
        ("tar:a-{0..2}?.tar", "a-{0..2}?.tar", ""),
        ("folder:a?label=b", "a?label=b", ""),  # it takes no options: the path is called so
    ):
        kind = spec.partition(":")[0]
        assert absolute_spec(spec) == f"{kind}:{tmp_path}/{path}{options}"
        assert spec_at(spec, Path("/new")) == f"{kind}:/new{options}"
    for spec, moved in (
        ("torchvision:STL10:data?split=unlabeled", "torchvision:STL10:/new?split=unlabeled"),
        ("python:my: sets.py:birds?size=3", "python:/new:birds?size=3"),
    ):
        assert spec_at(spec, Path("/new")) == moved


REFUSED = {
    "tree:@/none": ("tree:", "no such folder", "give one that holds images"),
    "tree:@/empty": ("tree:", "has no images", "at any depth"),
    "tree:@?label=top": ("label is 'top'", "folder, none, or a regular expression"),
    "tree:@?label=(a": ("label=(a is no regular expression", "label=none"),
    "tree:@?label=(a)(b)": ("has 2 groups", "write (?:…) for all others"),
    "tree:@?label=x(y)z": ("matches none of 5 paths", "top.png", "label=none"),
    "tree:@?labels=none": ("tree: has no option 'labels'", "did you mean 'label'"),
    "tree:@?label=none&label=folder": ("has the option label twice",),
    "tree:@?label=": ("the option label is empty",),
    "tree:": ("names no path", "tree:PATH"),
    "python:a.py": ("lacks a name or a path", "python:FILE.py:NAME"),
    "list:@": ("is a folder", "tree:"),
    "list:@/none.txt": ("there is no such file", "behind a tab"),
    "list:@/bad.txt": ("line 2 names no path",),
    "list:@/ok.txt?label=kind": ("label is 'kind'", "use none"),
    "list:@/ok.txt?root=none": ("root is", "no such folder"),
    "list:@/nothing.txt": ("names no image",),
    "csv:@/a.csv": ("has no column 'path'", "did you mean 'paths'", "?path=COLUMN"),
    "csv:@/a.csv?path=paths&label=sort": ("has no column 'sort'", "?label=COLUMN"),
    "csv:@/twice.csv": ("several columns called 'path'",),
}


@pytest.mark.parametrize("spec", REFUSED)
def test_lists_and_trees_are_refused(spec: str, tmp_path: Path):
    tree(tmp_path)
    files = {"bad.txt": "top.png\n\ttop\n", "ok.txt": "top.png\n", "nothing.txt": "\n\n"}
    files |= {"a.csv": "paths,kind\ntop.png,a\n", "twice.csv": "path,path\na,b\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        open_source(spec.replace("@", str(tmp_path)), "train")
    for part in REFUSED[spec]:
        assert part in str(caught.value)
