"""Holds the layout: the rules of tests/helpers/layout_rules.py over this checkout, and each rule over a small tree that
breaks it."""

from functools import cache
from pathlib import Path

import pytest

from tests.helpers import layout_rules as rules
from tests.helpers.layout_rules import RULES, Problem, Rule
from tests.helpers.source_tree import SourceTree

ROOT = Path(__file__).resolve().parents[1]
# (rule, file) -> the reason for which the rule does not hold there. Keep it short: first try to mend the file.
EXCEPTIONS: dict[tuple[Rule, str], str] = {
    (rules.papers_hold_one_method_each, "launch/worker/pretrained.py"): (
        "EncoderAlone stands for an encoder's file that is evaluated: no recipe names it, and nothing trains it"
    ),
}


@cache
def problems(rule: Rule) -> list[Problem]:
    return list(rule(_checkout()))


@cache
def _checkout() -> SourceTree:
    return SourceTree(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_checkout_keeps(rule: Rule):
    found = [str(problem) for problem in problems(rule) if (rule, problem.path) not in EXCEPTIONS]
    assert not found, "\n".join([f"{len(found)} places break the layout (CONTRIBUTING.md):", *found])


def test_every_exception_is_needed():
    broken = {(rule, problem.path) for rule in RULES for problem in problems(rule)}
    idle = [f"{path}: {rule.__name__}" for rule, path in EXCEPTIONS.keys() - broken]
    assert not idle, f"nothing breaks these rules there any more; delete the exceptions: {idle}"


# A project in small that keeps every rule.
GOOD = {
    "launch/__init__.py": '"""Gets a run onto machines."""\n',
    "launch/__main__.py": '"""The commands."""\n\nfrom kilobatch.launch.cli import train\n',
    "launch/cli/train.py": (
        '"""Trains."""\n\n\ndef train():\n    import torch\n\n    from kilobatch.trainer import loop\n'
    ),
    "trainer/loop.py": '"""The loop."""\n\nimport torch\n\nfrom kilobatch.methods.method import Method\n',
    "methods/method.py": '"""The protocol of a method."""\n\n\nclass Method:\n    """A method."""\n',
    "methods/options.py": '"""Options."""\n\nfrom pydantic import Field\n',
    "methods/papers/byol.py": (
        '"""BYOL."""\n\nfrom kilobatch.data import errors\nfrom kilobatch.methods.method import Method\n\n\n'
        'class BYOL(Method):\n    """BYOL."""\n'
    ),
    "methods/parity/formulas/byol.py": '"""BYOL\'s formula."""\n',
    "data/errors.py": '"""Errors."""\n',
    "configs/byol_cifar10.yaml": "method:\n  name: byol\n",
    "tests/methods/papers/test_byol.py": '"""Tests BYOL."""\n',
}
PAPER = GOOD["methods/papers/byol.py"]
# The rule, files that are written over those of GOOD, and parts of the lines that must come of it.
FAULTS: list[tuple[Rule, dict[str, str], list[str]]] = [
    (
        rules.imports_follow_the_order,  # a lower room of one folder imports a higher one
        {"launch/cli/train.py": "", "launch/runs/overview.py": "\nfrom kilobatch.launch.cli.train import train\n"},
        ["launch/runs/overview.py:2: launch/runs may not import launch/cli/train.py"],
    ),
    (
        rules.imports_follow_the_order,  # side by side
        {
            "methods/tiles/ops.py": "import kilobatch.methods.networks.vit as vit\n",
            "methods/networks/vit.py": "def build():\n    from kilobatch.methods.tiles import ops\n",
        },
        [
            "methods/tiles/ops.py:1: methods/tiles may not import methods/networks/vit.py",
            "methods/networks/vit.py:2: methods/networks may not import methods/tiles/ops.py",
        ],
    ),
    (
        rules.imports_follow_the_order,  # folders against launch > trainer > methods > data, for the type checker alone
        {"data/errors.py": "import typing\nif typing.TYPE_CHECKING:\n    from kilobatch.trainer import loop\n"},
        ["data/errors.py:3: data/ may not import trainer/loop.py"],
    ),
    (
        rules.imports_follow_the_order,  # the top of methods/ is its lowest room
        {"methods/method.py": "from .papers.byol import BYOL\n"},
        ["methods/method.py:1: methods/*.py may not import methods/papers/byol.py"],
    ),
    (
        rules.imports_follow_the_order,  # the top of trainer/ is for bench/ and launch/ alone
        {"trainer/optim/lars.py": "from kilobatch.trainer.loop import train\n"},
        ["trainer/optim/lars.py:1: trainer/optim may not import trainer/loop.py"],
    ),
    (
        rules.imports_follow_the_order,
        {"launch/attic/old.py": ""},
        ["launch/attic/old.py:1: launch/attic has no place in ORDER"],
    ),
    (
        rules.no_circles,  # files; one of the two imports is lazy
        {
            "data/views/a.py": "from kilobatch.data.views.b import B\n",
            "data/views/b.py": "class B:\n    def make(self):\n        from kilobatch.data.views import a\n",
        },
        ["data/views/a.py:1: data/views/a.py imports data/views/b.py", "data/views/b.py:3: data/views/b.py imports"],
    ),
    (
        rules.no_circles,  # folders, whose files are in no circle
        {
            "data/views/a.py": "from kilobatch.data.sources import c\n",
            "data/sources/c.py": "",
            "data/sources/d.py": "from kilobatch.data.augment import e\n",
            "data/augment/e.py": "from kilobatch.data.views import b\n",
            "data/views/b.py": "",
        },
        [
            "data/views/a.py:1: data/views imports data/sources",
            "data/sources/d.py:1: data/sources imports data/augment",
            "data/augment/e.py:1: data/augment imports data/views",
        ],
    ),
    (
        rules.torch_is_imported_late_in_launch,
        {"launch/cli/train.py": '"""Trains."""\nfrom torch import Tensor\n', "launch/worker/main.py": "import torch\n"},
        ["launch/cli/train.py:2: torch takes seconds"],
    ),
    (
        rules.options_load_neither_torch_nor_numba,
        {"methods/options.py": "from kilobatch.data import errors\n", "data/errors.py": "import numba.core\n"},
        ["data/errors.py:1: methods/options.py would load numba"],
    ),
    (
        rules.papers_hold_one_method_each,  # a paper outside papers/
        {"methods/losses/moco.py": "from kilobatch.methods.papers import byol\nclass MoCo(byol.BYOL):\n    pass\n"},
        ["methods/losses/moco.py:2: MoCo is a Method"],
    ),
    (
        rules.papers_hold_one_method_each,  # under another name
        {"trainer/moco.py": "from kilobatch.methods.method import Method as M\nclass MoCo(M):\n    pass\n"},
        ["trainer/moco.py:2: MoCo is a Method"],
    ),
    (
        rules.papers_hold_one_method_each,
        {
            "methods/papers/byol.py": f"{PAPER}class Second(BYOL):\n    pass\nclass Queue:\n    pass\n",
            "methods/papers/shared.py": "",
        },
        [
            "methods/papers/byol.py:1: a paper's file holds one Method, this one holds 2",
            "methods/papers/byol.py:11: Queue is no Method",
            "methods/papers/shared.py:1: a paper's file holds one Method, this one holds 0",
        ],
    ),
    (
        rules.public_classes_have_names_of_their_own,
        {
            "launch/runs/row.py": "class Row: ...\nclass _Own: ...\n",
            "data/row.py": "\nclass Row: ...\nclass _Own: ...\n",
        },
        ["launch/runs/row.py:1: a class Row stands in data/row.py:2 too"],
    ),
    (
        rules.files_are_named_after_what_they_hold,
        {"launch/processes/leash.py": "", "data/views/cut_here.py": "", "tests/launch/test_peers.py": ""},
        [
            "launch/processes/leash.py:1: 'leash' is a metaphor",
            "data/views/cut_here.py:1: 'cut' is a bare participle",
            "data/views/cut_here.py:1: 'here' is an adverb",
            "tests/launch/test_peers.py:1: 'peers' is a metaphor",
        ],
    ),
    (
        rules.package_files_hold_one_line,
        {
            "launch/__init__.py": '"""Two\n\nlines."""\n',
            "data/__init__.py": '"""Data."""\nfrom .errors import UserError\n',
        },
        [
            "launch/__init__.py:1: an __init__.py holds",
            "data/__init__.py:1: an __init__.py holds",
            "data/__init__.py:2: an __init__.py imports nothing",
        ],
    ),
    (
        rules.sizes_are_kept,
        {
            "data/errors.py": "x = 1\n" * 301,
            "trainer/loop.py": "class A:\n    def long(self):\n" + "        x = 1\n" * 60,
            **{f"data/views/v{number}.py": "" for number in range(15)},
            **{f"methods/papers/p{number}.py": "" for number in range(15)},
            **{f"docs/d{number}.md": "" for number in range(15)},
        },
        [
            "data/errors.py:301: a file of 301 lines",
            "trainer/loop.py:2: long has 61 lines",
            "data/views:0: 15 files side by side",
            "docs:0: 15 files side by side",
        ],
    ),
    (
        rules.docstrings_begin_with_a_noun_or_a_verb,
        {"data/errors.py": '"""What users can mend."""\n', "trainer/loop.py": "import torch\n"},
        ["data/errors.py:1: the docstring begins with 'What'", "trainer/loop.py:1: the module has no docstring"],
    ),
    (
        rules.packages_are_imported_under_one_name,
        {"tests/test_loop.py": "from trainer import loop\nimport data.errors\nfrom kilobatch.data import errors\n"},
        ["tests/test_loop.py:1: import kilobatch.trainer.loop", "tests/test_loop.py:2: import kilobatch.data.errors"],
    ),
    (
        rules.every_paper_has_formula_and_recipe,
        {"methods/papers/moco.py": "", "configs/swav.yaml": "extends: byol_cifar10\nmethod:\n  name: swav\n"},
        [
            "methods/papers/moco.py:1: no formula",
            "methods/papers/moco.py:1: no recipe",
            "configs/swav.yaml:1: method.name is swav",
        ],
    ),
    (
        rules.tests_mirror_the_folders,
        {"tests/trainer/optim/test_lars.py": "", "tests/helpers/test_nothing.py": ""},
        ["tests/trainer/optim/test_lars.py:1: there is no folder trainer/optim/"],
    ),
]


def _tree(root: Path, files: dict[str, str]) -> SourceTree:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return SourceTree(root)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_tree_that_keeps_all_rules_passes(rule: Rule, tmp_path: Path):
    assert [str(problem) for problem in rule(_tree(tmp_path, GOOD))] == []


@pytest.mark.parametrize(("rule", "files", "expected"), FAULTS, ids=[rule.__name__ for rule, _, _ in FAULTS])
def test_a_fault_is_found(rule: Rule, files: dict[str, str], expected: list[str], tmp_path: Path):
    found = [str(problem) for problem in rule(_tree(tmp_path, GOOD | files))]
    missed = [text for text in expected if not any(line.startswith(text) for line in found)]
    assert not missed, f"not found: {missed}; found: {found}"
    assert len(found) == len(expected), found


def test_each_rule_is_tried():
    assert {rule for rule, _, _ in FAULTS} == set(RULES)
