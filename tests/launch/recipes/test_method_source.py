"""Methods' options, read from their files without importing them."""

import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_type_hints

import pytest
from pydantic import ValidationError

from kilobatch.data.errors import Refusal
from kilobatch.launch.recipes import checks, method_options, method_source, recipe


@pytest.mark.parametrize("name", method_options.names())
def test_as_the_imported_class_says(name: str) -> None:
    declared, cls = method_options.declared(name), method_options.method_class(name)
    hints = get_type_hints(cls.__init__, include_extras=True)
    said = {
        argument.name: (hints[argument.name], ... if argument.default is argument.empty else argument.default)
        for argument in inspect.signature(cls).parameters.values()
        if argument.kind is argument.KEYWORD_ONLY
    }
    assert repr(declared.arguments) == repr(said)  # bounds have no equality of their own
    told = declared.class_name, declared.views, declared.classifies, declared.head_layers
    assert told == (cls.__name__, cls.views, cls.classifies, cls.head_layers)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Writes a file of methods/, which is empty."""

    def forget() -> None:
        for cached in (method_source.declared, method_source._file, method_options.options_of):
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
    chosen = model.model_validate({"name": "base", "rate": 1, "queue": {"length": 7}})
    assert chosen.model_dump()["queue"]["length"] == 7
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
    assert method_options.names() == ["base", "other", "same"]


def test_no_method(write: Callable[[str, str], None]) -> None:
    write("losses", "import torch\nclass Loss(torch.nn.Module): ...\n")
    write("moco", "class MoCo(Method): ...\n")
    with pytest.raises(Refusal, match="no method 'losses'; known: moco"):
        method_options.declared("losses")
    with pytest.raises(Refusal, match="no method 'moko'; did you mean 'moco'"):
        method_options.declared("moko")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("from kilobatch.methods.norms import M\nclass A(Method):\n    def __init__(self, e, *, n: M): ...", "methods"),
        ("import torch\nclass A(Method):\n    def __init__(self, e, *, x: torch.Tensor): ...", "torch"),
        ("class A(Method):\n    def __init__(self, e, *, x: Missing): ...", "'Missing' is neither imported"),
        ("class A(Method):\n    def __init__(self, e, *, x=1): ...", "'x' has no type"),
        ("class A(Method): ...\nclass B(A): ...", "defines 2 methods"),
    ],
)  # fmt: skip
def test_what_its_author_is_told(text: str, told: str, write: Callable[[str, str], None]) -> None:
    write("a", text)
    with pytest.raises(AssertionError, match=told):
        method_options.declared("a")


def test_a_group_of_options_within_the_section(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\nmethod:\n  name: moco\n  queue:\n    length: 500\n    start: empty\n")
    chosen = recipe.resolve(str(file), ["method.queue.length=4096"]).method.model_dump()
    assert (chosen["queue"]["length"], chosen["queue"]["start"]) == (4096, "empty")
    again = tmp_path / "recipe.yaml"
    again.write_text(recipe.resolve(str(file), []).dump_yaml())
    assert recipe.load(again)[0] == recipe.resolve(str(file), [])
    with pytest.raises(Refusal, match=r"override .*: 'method.queue' has no key 'lenght'; did you mean 'length'\?"):
        recipe.resolve(str(file), ["method.queue.lenght=1"])
    with pytest.raises(Refusal, match=r"override .*: method.queue.length is 0; it should be greater than or equal"):
        recipe.resolve(str(file), ["method.queue.length=0"])
    with pytest.raises(Refusal, match=r"method.queue is 7; it holds keys of its own \(length"):
        recipe.resolve(str(file), ["method.queue=7"])

    checks.check(*_with_workers(*recipe.read(str(file), ["data.batch=500"])))
    with pytest.raises(Refusal, match=r"mine.yaml line 5: method.queue.length 500 .* 502"):
        checks.check(*_with_workers(*recipe.read(str(file), ["data.batch=502"])))


def _with_workers(chosen: recipe.Recipe, settings: recipe.Settings) -> tuple[recipe.Recipe, int, recipe.Settings]:
    return chosen, 2, settings
