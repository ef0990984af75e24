"""The rules of the layout, each a function that yields where a tree of files breaks it."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml

from tests.helpers.source_tree import FOLDERS, PACKAGE, SourceFile, SourceTree

# Left imports right, never the reverse. Between commas: side by side, neither imports the other. *.py: the files at
# the top of the folder. Two folders that no line connects do not import each other.
ORDER = {
    "launch": [
        "*.py > cli > jobs > pipelines, planning, nodes > worker > recipes > runs > schedulers, processes",
    ],
    "trainer": [
        "bench > *.py > monitor > evaluate > ranks",
        "*.py > optim > checkpoint > ranks",
        "evaluate > optim",
        "*.py > costs, tf_import",
    ],
    "methods": ["parity > papers > losses > memories, clusters > networks, tiles > *.py"],
    "data": ["loading > augment > views, sources > *.py"],
}
TORCH_IN_LAUNCH = ["launch/worker/*", "launch/planning/fake_*"]
FILE_LINES, FUNCTION_LINES, FILES_IN_FOLDER = 300, 60, 14
# These grow by one file for each paper or source; tests mirror what they test.
LARGE_FOLDERS = ["methods/papers", "methods/parity/formulas", "data/sources", "configs", "docs/methods", "tests*"]
BANNED = {
    "a metaphor": "leash strike pulse news echo silence watch meeting peers scene room chance pretence standing blow "
    "board manners errand hub spoke trouble epitaph blame",
    "an adverb or a preposition": "here across beside together alone meanwhile",
    "a bare participle": "drawn cut saved stored trained chosen asked given told came",
    "an adjective": "small big",
}


@dataclass(frozen=True)
class Problem:
    path: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.text}"


Rule = Callable[[SourceTree], Iterator[Problem]]
RULES: list[Rule] = []


def rule(check: Rule) -> Rule:
    RULES.append(check)
    return check


@rule
def imports_follow_the_order(tree: SourceTree) -> Iterator[Problem]:
    below = {folder: _below(chains) for folder, chains in ORDER.items()}
    for file in tree.sources:
        top, room = _place(file.path)
        if room not in below[top]:
            yield Problem(file.path, 1, f"{top}/{room} has no place in ORDER of tests/helpers/layout_rules.py; add it")
            continue
        for one, target in tree.imported(file):
            to, to_room = _place(target)
            if to not in FOLDERS:
                continue
            if FOLDERS.index(to) < FOLDERS.index(top):
                yield Problem(file.path, one.line, f"{top}/ may not import {target}: {' > '.join(FOLDERS)}")
            elif to == top and to_room != room and to_room not in below[top][room]:
                order = " and ".join(f"{top}: {chain}" for chain in ORDER[top])
                yield Problem(file.path, one.line, f"{top}/{room} may not import {target}; the order is {order}")


def _place(path: str) -> tuple[str, str]:
    """(launch, cli) of launch/cli/train.py, (launch, *.py) of launch/__main__.py."""
    top, *rest = path.split("/")
    return top, rest[0] if len(rest) > 1 else "*.py"


def _below(chains: list[str]) -> dict[str, set[str]]:
    """What each room may import."""
    direct: dict[str, set[str]] = defaultdict(set)
    for chain in chains:
        levels = [level.strip().split(", ") for level in chain.split(">")]
        for upper, lower in zip(levels, [*levels[1:], []], strict=True):
            for room in upper:
                direct[room] |= set(lower)
    return {room: _reached(room, direct) for room in direct}


def _reached(start: str, direct: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(direct.get(start, ()))
    while waiting:
        if (one := waiting.pop()) not in found:
            found.add(one)
            waiting += direct.get(one, ())
    return found


@rule
def no_circles(tree: SourceTree) -> Iterator[Problem]:
    """In each folder, its files and its subfolders (each of them as a whole) import each other in no circle."""
    folders: dict[str, dict[tuple[str, str], tuple[str, int]]] = defaultdict(dict)
    for file in tree.sources:
        for one, target in tree.imported(file):
            mine, other = file.path.split("/"), target.split("/")
            shared = next((n for n, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), None)
            if shared is not None:
                step = ("/".join(mine[: shared + 1]), "/".join(other[: shared + 1]))
                folders["/".join(mine[:shared])].setdefault(step, (file.path, one.line))
    for steps in folders.values():
        direct: dict[str, set[str]] = defaultdict(set)
        for start, end in steps:
            direct[start].add(end)
        reached = {start: _reached(start, direct) for start in list(direct)}
        for (start, end), (path, line) in steps.items():
            if start in reached.get(end, ()):
                yield Problem(path, line, f"{start} imports {end}, which imports {start} in turn, itself or by others")


@rule
def torch_is_imported_late_in_launch(tree: SourceTree) -> Iterator[Problem]:
    for file in tree.sources:
        if file.path.startswith("launch/") and not any(fnmatch(file.path, allowed) for allowed in TORCH_IN_LAUNCH):
            for one in file.imports:
                if one.when == "top" and one.module.split(".")[0] == "torch":
                    yield Problem(
                        file.path,
                        one.line,
                        f"torch takes seconds to import: import it inside the function, or in {TORCH_IN_LAUNCH}",
                    )


@rule
def options_load_neither_torch_nor_numba(tree: SourceTree) -> Iterator[Problem]:
    """Options are read where recipes are, on login nodes; what they import is followed."""
    for file in tree.sources:
        if file.name != "options":
            continue
        seen, waiting = {file.path}, [file]
        while waiting:
            current = waiting.pop()
            for one in current.imports:
                if one.when == "top" and one.module.split(".")[0] in ("torch", "numba"):
                    yield Problem(current.path, one.line, f"{file.path} would load {one.module.split('.')[0]} by this")
            for one, target in tree.imported(current):
                if one.when == "top" and target not in seen:
                    seen.add(target)
                    waiting.append(tree.files[target])


@rule
def papers_hold_one_method_each(tree: SourceTree) -> Iterator[Problem]:
    methods = _methods(tree)
    for file in tree.sources:
        in_papers = file.path.startswith("methods/papers/")
        own = [cls for cls in file.classes if cls.name in methods]
        if not in_papers:
            for cls in own:
                if file.path != "methods/method.py":
                    yield Problem(file.path, cls.line, f"{cls.name} is a Method: its place is methods/papers/")
        elif file.name != "__init__":
            if file.folder != "methods/papers":
                yield Problem(
                    file.path, 1, "methods/papers/ has no subfolders: method.name is the name of a file there"
                )
            if len(own) != 1:
                yield Problem(file.path, 1, f"a paper's file holds one Method, this one holds {len(own)}")
            for cls in file.classes:
                if cls not in own:
                    yield Problem(
                        file.path, cls.line, f"{cls.name} is no Method: its place is losses/, memories/ or networks/"
                    )


def _methods(tree: SourceTree) -> set[str]:
    """Names of the classes that derive from Method, directly or by others. Class names are unique: see below."""
    found = {"Method"}
    classes = [cls for file in tree.sources for cls in file.classes]
    while more := {cls.name for cls in classes if found.intersection(cls.bases)} - found:
        found |= more
    return found


@rule
def public_classes_have_names_of_their_own(tree: SourceTree) -> Iterator[Problem]:
    first: dict[str, str] = {}
    for file in tree.sources:
        for cls in file.classes:
            if cls.name.startswith("_"):
                continue
            if cls.name in first:
                yield Problem(file.path, cls.line, f"a class {cls.name} stands in {first[cls.name]} too; rename one")
            first.setdefault(cls.name, f"{file.path}:{cls.line}")


@rule
def files_are_named_after_what_they_hold(tree: SourceTree) -> Iterator[Problem]:
    kinds = {word: kind for kind, words in BANNED.items() for word in words.split()}
    for path in tree.files:
        for word in re.split(r"[/_.]", path):
            if word in kinds:
                yield Problem(path, 1, f"'{word}' is {kinds[word]}; name the file after the thing that it holds")


@rule
def package_files_hold_one_line(tree: SourceTree) -> Iterator[Problem]:
    for file in tree.files.values():
        if file.name == "__init__" and file.path != f"src/{PACKAGE}/__init__.py":
            if file.imports:
                yield Problem(
                    file.path, file.imports[0].line, "an __init__.py imports nothing: a reader would load torch"
                )
            if not file.docstring or "\n" in file.docstring or file.statements != 1:
                yield Problem(file.path, 1, "an __init__.py holds a docstring of one line and nothing else")


@rule
def sizes_are_kept(tree: SourceTree) -> Iterator[Problem]:
    folders: dict[str, int] = defaultdict(int)
    for file in tree.files.values():
        folders[file.folder] += file.name != "__init__"
        if file.lines > FILE_LINES:
            yield Problem(file.path, file.lines, f"a file of {file.lines} lines; {FILE_LINES} are allowed, so split it")
        for function in file.functions:
            if function.lines > FUNCTION_LINES:
                yield Problem(
                    file.path,
                    function.line,
                    f"{function.name} has {function.lines} lines; {FUNCTION_LINES} are allowed, so split it",
                )
    for document in (tree.root / "docs").rglob("*.md"):
        folders[document.parent.relative_to(tree.root).as_posix()] += 1
    for folder, files in folders.items():
        if files > FILES_IN_FOLDER and not any(fnmatch(folder, large) for large in LARGE_FOLDERS):
            yield Problem(folder, 0, f"{files} files side by side; {FILES_IN_FOLDER} are allowed, so make subfolders")


@rule
def docstrings_begin_with_a_noun_or_a_verb(tree: SourceTree) -> Iterator[Problem]:
    for file in tree.files.values():
        if file.docstring is None:
            if not file.path.startswith("tests/"):  # a test file's name and its tests' names may say enough
                yield Problem(file.path, 1, "the module has no docstring")
        elif asked := re.match(r"(What|Whether|Which|How|Where|When|Who|Why)\b", file.docstring):
            yield Problem(file.path, 1, f"the docstring begins with '{asked[1]}'; begin with a noun or a verb")


@rule
def packages_are_imported_under_one_name(tree: SourceTree) -> Iterator[Problem]:
    for file in tree.files.values():
        for one in file.imports:
            if one.module.split(".")[0] in (*FOLDERS, "configs"):
                yield Problem(
                    file.path, one.line, f"import {PACKAGE}.{one.module}: bare, it may be a user's own module"
                )


@rule
def every_paper_has_formula_and_recipe(tree: SourceTree) -> Iterator[Problem]:
    papers = {file.name for file in tree.sources if file.folder == "methods/papers"} - {"__init__"}
    recipes = {name: path for path in sorted((tree.root / "configs").glob("*.yaml")) if (name := _method_of(path))}
    for paper in sorted(papers):
        if f"methods/parity/formulas/{paper}.py" not in tree.files:
            yield Problem(f"methods/papers/{paper}.py", 1, f"no formula: write methods/parity/formulas/{paper}.py")
        if paper not in recipes:
            yield Problem(f"methods/papers/{paper}.py", 1, f"no recipe in configs/ has method.name {paper}")
    for name, path in recipes.items():
        if name not in papers:
            yield Problem(f"configs/{path.name}", 1, f"method.name is {name}; there is no methods/papers/{name}.py")


def _method_of(recipe: Path) -> str | None:
    method = (yaml.safe_load(recipe.read_text("utf-8")) or {}).get("method")
    return method.get("name") if isinstance(method, dict) else None


@rule
def tests_mirror_the_folders(tree: SourceTree) -> Iterator[Problem]:
    folders = {file.folder for file in tree.sources}
    for file in tree.files.values():
        mirrored = file.folder.removeprefix("tests/")
        if _is_test(file) and mirrored.split("/")[0] in FOLDERS and mirrored not in folders:
            yield Problem(file.path, 1, f"there is no folder {mirrored}/ to be tested here; move the test")


def _is_test(file: SourceFile) -> bool:
    return file.path.startswith("tests/") and file.name.startswith("test_")
