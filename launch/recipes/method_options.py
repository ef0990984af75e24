"""Finds methods by file name, and makes the recipe's `method` section of their constructors' arguments."""

import ast
import importlib
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from kilobatch.data.errors import UserError, choices
from kilobatch.launch.recipes import method_source
from kilobatch.launch.recipes.method_source import Declared
from kilobatch.methods.networks.options import refuse_layers
from kilobatch.methods.source_file import absolute_source, check_source, is_source, load_source, parse_source

if TYPE_CHECKING:
    from kilobatch.methods.method import Method
    from kilobatch.methods.networks.encoder import Encoder


class MethodOptions(BaseModel):
    """The options of a method; the keys beside its name are its constructor's keyword arguments.

    name: a file of methods/papers/.
    """

    model_config = ConfigDict(extra="forbid")
    name: str


def method_names() -> list[str]:
    """The files of methods/papers/ that define a Method."""
    return [name for name in method_source.files() if method_source.read_declaration(name)]


def declared(name: str) -> Declared:
    """What methods/papers/<name>.py, or the class of FILE.py:Class, declares. Raises UserError for an unknown name."""
    if is_source(name):
        check_source(name, ast.ClassDef)
        if found := method_source.read_declaration(name):
            return found
        file, cls = parse_source(name)
        raise UserError(
            f"{cls} of {file} is no method: it should derive from Method of kilobatch.methods.method, or from a class "
            "of kilobatch.methods.papers (kilobatch new method NAME writes a start)"
        )
    found = method_source.read_declaration(name) if name in method_source.files() else None
    if found is None:
        raise UserError(f"there is no method '{name}'{choices(name, method_names())}")
    return found


def options_of(name: str) -> type[MethodOptions]:
    """The model of `method: {name: <name>, ...}`: the keyword arguments of the method's constructor, with their
    types, bounds and defaults. Raises UserError for an unknown name."""
    return _options_of(absolute_source(name))  # so that a file has one model, by whatever path


@cache
def _options_of(name: str) -> type[MethodOptions]:
    found = declared(name)
    said = meanings(found.texts, found.arguments)
    arguments: dict[str, Any] = {
        key: (Annotated[type_, Field(description=said[key])] if key in said else type_, default)
        for key, (type_, default) in found.arguments.items()
    }
    if is_source(name):
        arguments["name"] = (Annotated[str, Field(description="your class, by any path")], ...)
    else:
        arguments["name"] = (Literal[name], ...)  # pyright: ignore[reportInvalidTypeForm]  # known at run time only
    return create_model(model_name(name), __base__=MethodOptions, **arguments)


def model_name(name: str) -> str:
    """The name of a method's options in the JSON schema."""
    return f"{parse_source(name).name if is_source(name) else name}_options"


def meanings(texts: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """What docstrings say of options, in parts such as `dim: of the projections; layers: of the head`. A part ends
    where the next begins, or with its paragraph. The first text that says something of an option counts.

    texts: of a class and those that it derives from; names: of the options. A sentence that begins as `word: ` ends a
    part, too: it may be of an option that only a class above has. After a semicolon it is a value, as in `null: none`.
    """
    found: dict[str, str] = {}
    head = re.compile(rf"(?:^|(?<=[.;] ))({'|'.join(map(re.escape, names)) or '$^'}): |(?<=[.] )[a-z]\w*: ")
    for text in texts:
        own: dict[str, str] = {}
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            parts = list(head.finditer(line))
            ends = [*(part.start() for part in parts), len(line)][1:]
            own |= {
                part[1]: line[part.end() : end].strip(" .;") for part, end in zip(parts, ends, strict=True) if part[1]
            }
        found = own | found
    return found


def head_of(options: Any) -> tuple[int, int | None]:
    """The number of layers of a method's projection head, and the width of the projections that the last one makes;
    None where all are hidden layers."""
    said = declared(options.name).head_layers
    layers = getattr(options, said) if isinstance(said, str) else said
    return layers, options.dim if layers else None


def check_head(options: Any, where: str, head: tuple[int, int | None], refuse: Callable[[str, str], UserError]) -> None:
    """Raises UserError, worded by refuse(option, message), where fine-tuning cannot keep as many layers of a head as it
    should."""
    try:
        refuse_layers(options.layer, options.dim, where, *head)
    except UserError as error:
        raise refuse("method.layer", str(error)) from error


def method_class(name: str) -> "type[Method]":
    """The class of a method; imports it, and with it torch. Raises UserError for an unknown name."""
    if is_source(name):
        return load_source(name)
    class_name = declared(name).class_name
    return getattr(importlib.import_module(f"kilobatch.methods.papers.{name}"), class_name)


def build_method(options: MethodOptions, encoder: "Encoder") -> "Method":
    """The method that a recipe's section describes, around `encoder`."""
    arguments = {name: getattr(options, name) for name in type(options).model_fields if name != "name"}
    return method_class(options.name)(encoder, **arguments)
