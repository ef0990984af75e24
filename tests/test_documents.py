"""Checks that links, anchors, paths and modules named in documents and docstrings exist, and documents' line length."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.source_tree import FOLDERS, PACKAGE, SourceTree

ROOT = Path(__file__).resolve().parents[1]
LINE = 120
RECORDS = {"docs/log.md"}  # keeps the names and paths of its time
# Files that a document has its reader write, that another package has, or that are named for the example's sake.
EXAMPLES: dict[str, set[str]] = {
    "docs/first-steps.md": {"neighbours.py"},
    "docs/folders.md": {"FILE.py", "my_sets.py"},
    "docs/architecture.md": {"FILE.py"},
    "CONTRIBUTING.md": {"tests/data/sources/test_zip_archive.py"},
    "docs/networks/backbones.md": {"nets.py", "mine.py"},
    "docs/guides/coming-from.md": {"main_moco.py", "main_lincls.py", "main_dino.py", "main_linear.py"},
}
TOP = rf"(?:{'|'.join([*FOLDERS, 'configs', 'tests', 'benchmarks', 'docs', 'src'])})"
PATH = re.compile(rf"(?<![\w/.~<>-]){TOP}/[\w./*<>{{}},-]*")
FILE = re.compile(r"(?<![\w/.*<>-])\w+\.py\b")
# Without the package's name not `data.`: that is a section of recipes.
MODULE = re.compile(
    rf"(?<![\w./-])(?:{PACKAGE}\.(?:{TOP})|launch|trainer|methods|tests|benchmarks)(?:\.[A-Za-z_]\w*)+(?!\w*/)"
)
ENDINGS = (".py", ".md", ".yaml", ".json", ".png", ".txt", ".sh")


def documents(root: Path) -> list[Path]:
    found = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("benchmarks/*.md")]
    return sorted(path for path in found if path.relative_to(root).as_posix() not in RECORDS)


@cache
def _tree(root: Path) -> SourceTree:
    return SourceTree(root)


# What is checked


def broken_links(root: Path) -> Iterator[str]:
    for document in documents(root):
        for number, line in _prose(document.read_text("utf-8")):
            for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"`[^`]*`", "", line)):
                where = f"{document.relative_to(root)}:{number}"
                if re.match(r"[a-z]+:", target):
                    continue
                name, _, anchor = target.partition("#")
                file = (document.parent / name).resolve() if name else document
                if not file.exists():
                    yield f"{where}: the link leads to {name}, which does not exist"
                elif anchor and anchor not in _anchors(file.read_text("utf-8")):
                    yield f"{where}: {name or 'this document'} has no heading #{anchor}"


def broken_references(root: Path) -> Iterator[str]:
    """Paths and modules that are named and do not exist."""
    for document in documents(root):
        name = document.relative_to(root).as_posix()
        for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
            for quoted in re.findall(r"`([^`]+)`", line):
                for missing in _missing(root, quoted, files=True):
                    if missing not in EXAMPLES.get(name, ()):
                        yield f"{name}:{number}: {missing} does not exist"
    for file in _tree(root).files:
        for number, text in _docstrings_and_comments((root / file).read_text("utf-8")):
            for missing in _missing(root, text, files=False):
                yield f"{file}:{number}: {missing} does not exist"


def long_lines(root: Path) -> Iterator[str]:
    for document in documents(root):
        for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
            if len(re.sub(r"https?://[^\s)|]+", "", line)) > LINE:  # an address cannot be broken
                yield f"{document.relative_to(root)}:{number}: {len(line)} characters; {LINE} are allowed"


def _prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines outside of fenced code."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


def _anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    found: dict[str, int] = {}
    anchors = set()
    for _, line in _prose(text):
        if heading := re.match(r"#+ +(.*?) *$", line):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
            anchors.add(f"{slug}-{found[slug]}" if slug in found else slug)
            found[slug] = found.get(slug, 0) + 1
    return anchors


def _docstrings_and_comments(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and ast.get_docstring(node):
                yield from enumerate(str(first.value.value).splitlines(), first.lineno)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _missing(root: Path, text: str, files: bool) -> Iterator[str]:
    """What text names and root does not hold. files: single names of Python files as well, wherever they lie."""
    for path in PATH.findall(text):
        named = path.rstrip(".,")
        if named.endswith((*ENDINGS, "/")) and not _exists(root, named):
            yield named
    for match in MODULE.findall(text):
        if not match.endswith(ENDINGS) and not _is_module(root, match):
            yield match
    if files:
        known = {path.rpartition("/")[2] for path in _tree(root).files}
        yield from (name for name in FILE.findall(text) if name not in known)


def _exists(root: Path, named: str) -> bool:
    """Tests' paths may begin below tests/; <name> and * stand for any name, {a,b} for a and b."""
    pattern = re.sub(r"<[^>]*>", "*", named)
    choices = re.search(r"\{([^}]*)\}", pattern)
    each = [pattern.replace(choices[0], choice) for choice in choices[1].split(",")] if choices else [pattern]
    return all(any(next(start.glob(one.rstrip("/")), None) for start in (root, root / "tests")) for one in each)


def _is_module(root: Path, dotted: str) -> bool:
    """A module, a folder of modules, or something that stands in a module."""
    bare = dotted.removeprefix(f"{PACKAGE}.")
    first = bare.split(".")[0]
    parts = bare.split(".") if first in ("tests", "benchmarks") else [PACKAGE, *bare.split(".")]
    for end in range(len(parts), 0, -1):
        path = _tree(root).modules.get(".".join(parts[:end]))
        if path is not None:
            return end == len(parts) or re.search(rf"\b{parts[end]}\b", (root / path).read_text("utf-8")) is not None
    return (root / bare.replace(".", "/")).is_dir()


# This checkout


@pytest.mark.parametrize("check", [broken_links, broken_references, long_lines], ids=lambda check: check.__name__)
def test_this_checkout(check):
    found = list(check(ROOT))
    assert not found, "\n".join([f"{len(found)} places:", *found])


# Each check, tried on documents that are wrong


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in {
        "README.md": "# The title\n\nSee [the plan](docs/plan.md#how-it-is-made) and [above](#the-title).\n"
        "`launch/plan.py` has `launch.plan.Plan`; `plan.py`, `configs/<name>.yaml`, `data.views`, `mine.yaml`.\n"
        "[An address](https://example.org/" + "a" * 120 + ").\n",
        "docs/plan.md": "## How *it* is made?\n\n```\n[no](link.md)\n```\n",
        "docs/log.md": "`launch/gone.py`, [gone](gone.md), " + "long " * 40,
        "launch/plan.py": '"""Plans: launch/plan.py."""\n\nclass Plan:  # see launch/test_plan.py\n    pass\n',
        "tests/launch/test_plan.py": "# launch/test_plan.py, tests.launch, kilobatch.launch.plan\n",
        "configs/demo.yaml": "method: {}\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_right_documents_pass(root: Path):
    assert [*broken_links(root), *broken_references(root), *long_lines(root)] == []


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("README.md", "[a](docs/gone.md)", "README.md:1: the link leads to docs/gone.md"),
        ("docs/plan.md", "[a](../README.md#no-title)", "docs/plan.md:1: ../README.md has no heading #no-title"),
        ("docs/plan.md", "# A\n[b](#b)", "docs/plan.md:2: this document has no heading #b"),
    ],
)
def test_a_broken_link_is_found(root: Path, file: str, text: str, expected: str):
    (root / file).write_text(text)
    assert expected in "\n".join(broken_links(root))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("README.md", "`launch/gone.py`", "README.md:1: launch/gone.py does not exist"),
        ("README.md", "\n`configs/x_*.yaml`", "README.md:2: configs/x_*.yaml does not exist"),
        ("README.md", "`launch/{plan,gone}.py`", "README.md:1: launch/{plan,gone}.py does not exist"),
        ("docs/plan.md", "`gone.py`", "docs/plan.md:1: gone.py does not exist"),
        ("docs/plan.md", "`python -m benchmarks.gone`", "docs/plan.md:1: benchmarks.gone does not exist"),
        ("docs/plan.md", "`launch.plan.Gone`", "docs/plan.md:1: launch.plan.Gone does not exist"),
        (
            "launch/plan.py",
            '"""Plans.\n\nAs launch/gone.py does."""',
            "launch/plan.py:3: launch/gone.py does not exist",
        ),
        ("launch/plan.py", "x = 1  # kilobatch.data.gone", "launch/plan.py:1: kilobatch.data.gone does not exist"),
        ("launch/plan.py", "x = 1\n# optim/test_gone.py, tests/gone/", "launch/plan.py:2: tests/gone/ does not exist"),
    ],
)
def test_a_broken_reference_is_found(root: Path, file: str, text: str, expected: str):
    (root / file).write_text(text)
    assert expected in "\n".join(broken_references(root))


def test_a_long_line_is_found(root: Path):
    (root / "README.md").write_text("ä" * 120 + "\n" + "ä" * 121)
    assert list(long_lines(root)) == ["README.md:2: 121 characters; 120 are allowed"]
