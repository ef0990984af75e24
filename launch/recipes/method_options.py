"""Finds methods by file name, and makes the recipe's `method` section of their constructors' arguments."""

import importlib
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, create_model

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.launch.recipes import method_source
from kilobatch.launch.recipes.method_source import Declared

if TYPE_CHECKING:
    from kilobatch.methods.method import Method
    from kilobatch.methods.networks.encoder import Encoder


class MethodOptions(BaseModel):
    """`name` is a module of methods/papers/; the other keys are its constructor's keyword arguments."""

    model_config = ConfigDict(extra="forbid")
    name: str


def method_names() -> list[str]:
    """The files of methods/papers/ that define a Method."""
    return [name for name in method_source.files() if method_source.read_declaration(name)]


def declared(name: str) -> Declared:
    """What methods/papers/<name>.py declares of its Method. Raises UserError for an unknown name."""
    found = method_source.read_declaration(name) if name in method_source.files() else None
    if found is None:
        raise UserError(f"there is no method '{name}'{did_you_mean(name, method_names())}")
    return found


@cache
def options_of(name: str) -> type[MethodOptions]:
    """The model of `method: {name: <name>, ...}`: the keyword arguments of the method's constructor, with their
    types, bounds and defaults. Raises UserError for an unknown name."""
    arguments: dict[str, Any] = dict(declared(name).arguments)
    arguments["name"] = (Literal[name], ...)  # pyright: ignore[reportInvalidTypeForm]  # known at run time only
    return create_model(f"{name}_options", __base__=MethodOptions, **arguments)


def method_class(name: str) -> "type[Method]":
    """The class of a method; imports it, and with it torch. Raises UserError for an unknown name."""
    class_name = declared(name).class_name
    return getattr(importlib.import_module(f"kilobatch.methods.papers.{name}"), class_name)


def build_method(options: MethodOptions, encoder: "Encoder") -> "Method":
    """The method that a recipe's section describes, around `encoder`."""
    arguments = {name: getattr(options, name) for name in type(options).model_fields if name != "name"}
    return method_class(options.name)(encoder, **arguments)
