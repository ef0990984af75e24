"""Methods' options, read from their files without importing them."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
from pydantic import ValidationError

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes import checks, method_options, method_source
from kilobatch.launch.recipes.recipe import Recipe, Settings, load_recipe, read_recipe, resolve_recipe


@pytest.mark.parametrize("name", method_options.method_names())
def test_as_the_imported_class_says(name: str) -> None:
    declared, cls = method_options.declared(name), method_options.method_class(name)
    hints = get_type_hints(cls.__init__, include_extras=True)
    imported = {
        argument.name: (hints[argument.name], ... if argument.default is argument.empty else argument.default)
        for argument in inspect.signature(cls).parameters.values()
        if argument.kind is argument.KEYWORD_ONLY
    }
    assert repr(declared.arguments) == repr(imported)  # bounds have no equality of their own
    read = declared.class_name, declared.views, declared.further_groups, declared.needs, declared.classifies
    assert read == (cls.__name__, cls.views, cls.further_groups, cls.needs, cls.classifies)
    assert declared.head_layers == cls.head_layers


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Writes a file of methods/, which is empty."""

    def forget() -> None:
        for cached in (method_source.read_declaration, method_source._file, method_options._options_of):
            cached.cache_clear()

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    monkeypatch.setattr(method_source, "FOLDER", tmp_path)
    forget()
    yield write
    forget()


BASE = """
from math import inf
from typing import Annotated, ClassVar
import no_such_package
from pydantic import Field
from kilobatch.methods.memories.queue import Queue
from kilobatch.methods.memories.options import QueueOptions
from kilobatch.methods.method import Method

POSITIVE = Annotated[float, Field(gt=0)]
LENGTHS = (2, 4)

class Helper:
    def __init__(self, *, other: int = 1): ...

class Base(Method):
    views: ClassVar[int | None] = 3
    def __init__(self, encoder, *, rate: POSITIVE, length: int = LENGTHS[1] ** 2, most: float = inf,
                 queue: QueueOptions | None = None) -> None:
        super().__init__()
"""


def test_constants_aliases_and_options_are_followed(write: Callable[[str, str], None]) -> None:
    write("base", BASE)
    declared = method_options.declared("base")
    assert (declared.class_name, declared.views) == ("Base", 3)
    assert {name: default for name, (_, default) in declared.arguments.items()} == {
        "rate": ...,
        "length": 16,
        "most": float("inf"),
        "queue": None,
    }
    model = method_options.options_of("base")
    recipe = model.model_validate({"name": "base", "rate": 1, "queue": {"length": 7}})
    assert recipe.model_dump()["queue"]["length"] == 7
    with pytest.raises(ValidationError, match="greater than 0"):
        model.model_validate({"name": "base", "rate": 0})


def test_a_method_of_another_file_is_built_upon(write: Callable[[str, str], None]) -> None:
    write("base", BASE)
    write("same", "from kilobatch.methods.papers.base import Base\nclass Same(Base):\n    views: int | None = None\n")
    write(
        "other",
        "from kilobatch.methods.papers import base as b\nfrom kilobatch.methods.papers.base import Base as B\n"
        "class Other(B):\n    def __init__(self, encoder, *, only: bool = True): ...\n",
    )
    same, other = method_options.declared("same"), method_options.declared("other")
    assert repr(same.arguments) == repr(method_options.declared("base").arguments)
    assert (same.class_name, same.views) == ("Same", None)
    assert (other.class_name, other.views, other.arguments) == ("Other", 3, {"only": (bool, True)})
    assert method_options.method_names() == ["base", "other", "same"]


def test_no_method(write: Callable[[str, str], None]) -> None:
    write("losses", "import torch\nclass Loss(torch.nn.Module): ...\n")
    write("moco", "class MoCo(Method): ...\n")
    with pytest.raises(UserError, match="no method 'losses'; known: moco"):
        method_options.declared("losses")
    with pytest.raises(UserError, match="no method 'moko'; did you mean 'moco'"):
        method_options.declared("moko")


METHOD = """
import torch
from typing import ClassVar
from kilobatch.methods.method import Method
from kilobatch.methods.networks.norms import Norm

SIZES = (2, 4)
PAIR, THREE = 2, 3
COUNT = 2
COUNT = COUNT + 1
if SIZES:
    FOUR = 4
def five(): return 5
class Six: ...

class A(Method):
"""  # its body follows from line 17 on
BODY_LINE = METHOD.count("\n") + 1


def method(*body: str) -> str:
    return METHOD + "\n".join(f"    {line}" for line in body)


def constructor(argument: str) -> str:
    return method(f"def __init__(self, encoder, *, {argument}) -> None: ...")


@pytest.mark.parametrize(
    "body",
    [
        ["views = 3"],
        ["views: ClassVar[int | None] = 3"],
        ["views: ClassVar[int | None]", "views = 3"],
        ["other = views = 3"],
        ["views = 2", "views = 3"],
        ["views = SIZES[0] + 1"],
        ["views = max(SIZES) - 1"],
        ["views = sum(size > 1 for size in SIZES) + 1"],
    ],
    ids=" ".join,
)
def test_attributes_in_a_class_body(body: list[str], write: Callable[[str, str], None]) -> None:
    write("a", method(*body, "classifies = True", "head_layers = 'layers'", "needs = frozenset({'tokens'})"))
    declared = method_options.declared("a")
    assert (declared.views, declared.classifies, declared.head_layers) == (3, True, "layers")
    assert declared.needs == {"tokens"}


def test_what_a_body_binds_elsewhere_is_no_attribute(write: Callable[[str, str], None]) -> None:
    local = ["def loss(self):", "    views = 3", "    return views", "fixed = [views for views in SIZES]"]
    write("a", method("classifies: ClassVar[bool]", *local))
    assert (method_options.declared("a").views, method_options.declared("a").classifies) == (None, False)


@pytest.mark.parametrize(
    "body",
    [
        ["views, classifies = 2, True"],
        ["views += 1"],
        ["if SIZES:", "    views = 2"],
        ["for views in SIZES: pass"],
        ["def views(self): return 2"],
        ["from math import pi as views"],
        ["def prepare(self): self.views = 2"],
    ],
    ids=" ".join,
)
def test_attributes_that_cannot_be_read(body: list[str], write: Callable[[str, str], None]) -> None:
    write("a", method("jigsaw = False", *body))
    line = BODY_LINE + 1 + (body[0] == "if SIZES:")
    with pytest.raises(UserError, match=rf"a\.py line {line}: A\.views cannot be read .* write `views = VALUE`"):
        method_options.declared("a")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (method("views = torch.tensor(2)"), 17, "'torch' cannot come from torch: take it from"),
        (method("views = Missing"), 17, "'Missing' is neither imported nor assigned"),
        (method("views = PAIR"), 17, "'PAIR' .* line 8 binds it"),
        (method("views = COUNT"), 17, "'COUNT' .* line 10 binds it"),
        (method("views = FOUR"), 17, "'FOUR' .* line 12 binds it"),
        (method("views = five()"), 17, "'five' .* line 13 binds it"),
        (method("views = 1 // 0"), 17, "`1 // 0` cannot be evaluated .ZeroDivisionError"),
        (constructor("x: Norm"), 17, "'Norm' cannot come from kilobatch.methods.networks.norms"),
        (constructor("x: torch.Tensor"), 17, "'torch' cannot come from torch"),
        (constructor("x: Missing"), 17, "'Missing' is neither imported"),
        (constructor("x: Six"), 17, "'Six' .* line 14 binds it"),
        (constructor("x=1"), 17, "'x' has no type; write one"),
        (constructor("x: 'int' = 1"), 17, "'x' has its type in quotes; write one"),
        (constructor("x: int = len(3)"), 17, r"`len\(3\)` cannot be evaluated \(TypeError"),
        (method("def __init__(self, encoder, **options: int): ..."), 17, "'options' is not given by keyword alone"),
        (method("def __init__(self, encoder, x: int = 1): ..."), 17, "'x' is not given by keyword alone"),
        (method("if SIZES:", "    def __init__(self, encoder): ..."), 18, "write `def __init__` directly"),
        (method("pass\nclass B(A): ..."), 18, "defines 2 methods"),
        (method("pass").replace("A(Method)", "A(Six, Method)"), 16, "derives from Six beside Method"),
        (method("views = = 2"), 17, "not valid Python"),
        ("from kilobatch.methods.papers.b import B\nclass A(B): ...", 2, "papers.b has no class 'B'"),
        ("from math import tao\nclass A(Method):\n    views = tao", 3, "'tao' cannot be imported from math"),
    ],
)
def test_what_its_author_is_told(text: str, line: int, message: str, write: Callable[[str, str], None]) -> None:
    write("a", text)
    with pytest.raises(UserError, match=rf"a\.py line {line}: .*{message}"):
        method_options.declared("a")


@pytest.mark.parametrize(
    ("import_", "base"),
    [
        ("from kilobatch.methods.papers import base", "base.Base"),
        ("import kilobatch.methods.papers.base", "kilobatch.methods.papers.base.Base"),
        ("from .base import Base as B", "B"),
        ("from . import base as b", "b.Base"),
    ],
)
def test_ways_to_name_another_papers_method(import_: str, base: str, write: Callable[[str, str], None]) -> None:
    write("base", BASE)
    write("other", f"{import_}\nclass Other({base}):\n    views = 1\n")
    assert method_options.declared("other").views == 1
    assert set(method_options.declared("other").arguments) == {"rate", "length", "most", "queue"}


def test_method_under_another_name(write: Callable[[str, str], None]) -> None:
    write("a", "from kilobatch.methods import method\nclass A(method.Method): ...\n")
    write("b", "from kilobatch.methods.method import Method as Base\nclass B(Base): ...\n")
    assert method_options.method_names() == ["a", "b"]


def test_a_constant_may_have_a_builtins_name(write: Callable[[str, str], None]) -> None:
    write("a", "max = 4\nclass A(Method):\n    views = max\n")
    assert method_options.declared("a").views == 4


def test_a_group_of_options_within_the_section(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\nmethod:\n  name: moco\n  queue:\n    length: 500\n    start: empty\n")
    recipe = resolve_recipe(str(file), ["method.queue.length=4096"]).method.model_dump()
    assert (recipe["queue"]["length"], recipe["queue"]["start"]) == (4096, "empty")
    again = tmp_path / "recipe.yaml"
    again.write_text(resolve_recipe(str(file), []).dump_yaml())
    assert load_recipe(again)[0] == resolve_recipe(str(file), [])
    with pytest.raises(UserError, match=r"override .*: 'method.queue' has no key 'lenght'; did you mean 'length'\?"):
        resolve_recipe(str(file), ["method.queue.lenght=1"])
    with pytest.raises(UserError, match=r"override .*: method.queue.length is 0; it should be greater than or equal"):
        resolve_recipe(str(file), ["method.queue.length=0"])
    with pytest.raises(UserError, match=r"method.queue is 7; it holds keys of its own \(length"):
        resolve_recipe(str(file), ["method.queue=7"])

    checks.check(*_with_workers(*read_recipe(str(file), ["data.batch=500"])))
    with pytest.raises(UserError, match=r"mine.yaml line 5: method.queue.length 500 .* 502"):
        checks.check(*_with_workers(*read_recipe(str(file), ["data.batch=502"])))


def _with_workers(recipe: Recipe, settings: Settings) -> tuple[Recipe, int, Settings]:
    return recipe, 2, settings
