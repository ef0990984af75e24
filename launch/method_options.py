"""Methods found by file name, and their constructors' arguments as the recipe's `method` section."""

import importlib
import inspect
import pkgutil
from functools import cache
from typing import Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model
from torch import nn

import methods
from data.refusal import Refusal, did_you_mean
from methods.method import Method


class MethodOptions(BaseModel):
    """`name` is the module in methods/; what else a section holds, its constructor says."""

    model_config = ConfigDict(extra="forbid")
    name: str


def names() -> list[str]:
    """Every module of methods/ that defines a Method."""
    modules = (module.name for module in pkgutil.iter_modules(methods.__path__))
    return [name for name in modules if _methods_in(name)]


@cache
def options_of(name: str) -> type[MethodOptions]:
    """The model of `method: {name: <name>, ...}`: the keyword arguments of the method's constructor, with their
    types, bounds and defaults. Raises Refusal for an unknown name."""
    constructor = method_class(name).__init__
    hints = get_type_hints(constructor, include_extras=True)
    arguments: dict[str, Any] = {
        argument.name: (hints[argument.name], ... if argument.default is argument.empty else argument.default)
        for argument in inspect.signature(constructor).parameters.values()
        if argument.kind is argument.KEYWORD_ONLY
    }
    arguments["name"] = (Literal[name], ...)  # pyright: ignore[reportInvalidTypeForm]  # known at run time only
    return create_model(f"{name}_options", __base__=MethodOptions, **arguments)


def method_class(name: str) -> type[Method]:
    """The one Method that methods/<name>.py defines. Raises Refusal for an unknown name."""
    found = _methods_in(name) if any(module.name == name for module in pkgutil.iter_modules(methods.__path__)) else []
    if not found:
        raise Refusal(f"there is no method '{name}'{did_you_mean(name, names())}")
    assert len(found) == 1, f"methods/{name}.py defines {len(found)} methods; a file holds one"
    return found[0]


def build(options: MethodOptions, encoder: nn.Module) -> Method:
    """The method that a recipe's section describes, around `encoder`."""
    arguments = {name: getattr(options, name) for name in type(options).model_fields if name != "name"}
    return method_class(options.name)(encoder, **arguments)


def _methods_in(name: str) -> list[type[Method]]:
    module = importlib.import_module(f"methods.{name}")
    classes = (value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, Method))
    return [cls for cls in classes if cls.__module__ == module.__name__ and cls is not Method]
