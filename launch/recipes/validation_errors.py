"""Turns what pydantic found wrong into plain sentences, each with the place where the value was written."""

import re
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from kilobatch.data.errors import Mistakes, did_you_mean, nearest
from kilobatch.launch.recipes.settings import Key, Settings, format_value


def note(error: ValidationError, settings: Settings, model: type[BaseModel], mistakes: Mistakes) -> None:
    """Notes all errors, each as a sentence. Unknown keys come first, since a misspelt key also leaves one missing."""
    of_key: dict[Key, list[Any]] = {}
    for one in sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden"):
        of_key.setdefault(_key(one, settings.values), []).append(one)
    meant: set[Key] = set()
    for key, errors in of_key.items():
        if errors[0]["type"] == "extra_forbidden":
            meant.add((*key[:-1], nearest(str(key[-1]), fields(model, key[:-1])) or ""))
        elif errors[0]["type"] == "missing" and key in meant:
            continue
        # Each member of a union, such as a number or "auto", has its own error; the words that are allowed come last.
        words = [e["ctx"]["expected"] for e in errors[1:] if e["type"] == "literal_error"]
        mistakes.add(_sentence(errors[0], settings, model) + (", or " + ", ".join(words) if words else ""))


def _sentence(error: Any, settings: Settings, model: type[BaseModel]) -> str:
    key = _key(error, settings.values)
    where, dotted = settings.where(key), ".".join(map(str, key)) or "the recipe"
    value = format_value(error["input"])
    if error["type"] == "extra_forbidden":
        return f"{where}: {_unknown(key, model)}"
    if error["type"] == "missing":
        return f"{settings.where(())}: {dotted} is missing"
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{where_of_parts(key, message, settings) or where}: {dotted}: {message}"
    if error["type"] in ("model_type", "model_attributes_type", "dict_type"):
        keys = ", ".join(fields(model, key))
        return f"{where}: {dotted} is {value}; it holds keys of its own ({keys})"
    allowed = error["msg"].replace("Input should", "it should", 1)
    near = None
    if error["type"] in ("literal_error", "enum"):
        near = nearest(str(error["input"]), [part.strip("'") for part in _quoted(error["ctx"]["expected"])])
    guess = f"; did you mean '{near}'?" if near else ""
    return f"{where}: {dotted} is {value}; {allowed[:1].lower()}{allowed[1:]}{guess}"


def where_of_parts(key: Key, message: str, settings: Settings) -> str:
    """The places of those keys of a section that a message about the section names; "" where it names none."""
    origins = {
        name: origin
        for (*section, name), origin in ((part, origin) for part, origin in settings.origins.items() if part)
        if tuple(section) == key and re.search(rf"\b{re.escape(str(name))}\b", message)
    }
    return ", ".join(dict.fromkeys(origins.values()))


def _unknown(key: Key, model: type[BaseModel]) -> str:
    *section, name = map(str, key)
    known = fields(model, key[:-1])
    guess = did_you_mean(name, known)
    elsewhere = [path for path in paths(model) if path.rpartition(".")[2] == name]
    if elsewhere:
        guess = "; did you mean " + " or ".join(f"'{path}'" for path in elsewhere[:3]) + "?"
    if not section:
        return f"there is no section '{name}'{guess}"
    return f"'{'.'.join(section)}' has no key '{name}'{guess}"


def _key(error: Any, values: Any) -> Key:
    """The key in the settings that pydantic means, without its own marks of union members."""
    key: list[str | int] = []
    absent = error["type"] in ("missing", "extra_forbidden")  # the others end with a key that there is, or with a mark
    for part in error["loc"]:
        parts: dict[Any, Any] = dict(enumerate(values)) if isinstance(values, list) else {}
        if isinstance(values, dict):
            parts = values
        if part in parts:
            values = parts[part]
            key.append(part)
        elif absent and part == error["loc"][-1] and isinstance(values, dict):
            key.append(part)
    return tuple(key)


def fields(model: type[BaseModel], key: Key) -> list[str]:
    """The names that may stand under `key`."""
    at = model
    for name in key:
        if isinstance(name, int):  # in a list, whose members are of one kind
            continue
        info = at.model_fields.get(str(name))
        inner = _models(info.annotation) if info else []
        if not inner:
            return []
        at = inner[0]
    return list(at.model_fields)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The option models within an annotation such as `Blur | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, Annotated):  # a list's members have the keys of a single one
        return [model for part in get_args(annotation) for model in _models(part)]
    return []


def paths(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys of a model, dotted."""
    found = []
    for name, info in model.model_fields.items():
        found.append(prefix + name)
        for inner in _models(info.annotation):
            found += paths(inner, f"{prefix}{name}.")
    return found


def _quoted(expected: str) -> list[str]:
    """pydantic's "'a', 'b' or 'c'" as a list."""
    return expected.replace(" or ", ", ").split(", ")
