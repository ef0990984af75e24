"""Reads the changes that the command line makes in a recipe: `section.key=value`, the value as YAML."""

import json
import re
from collections.abc import Sequence
from typing import Any

import yaml

from kilobatch.data.errors import Mistakes, UserError
from kilobatch.launch.recipes.settings import Key, Settings, parse

SHORT = {"seed": "run.seed"}  # keys that may be written without their section
NULL = ("null", "~")
SHOWN = 200  # characters of an override in messages


def read_overrides(overrides: Sequence[str], mistakes: Mistakes | None = None) -> Settings:
    """All overrides as one tree; a later one wins. mistakes: gets the texts that are not `section.key=value`; None:
    UserError is raised for them."""
    settings, found = Settings(), mistakes or Mistakes()
    for text in overrides:
        with found.noted():
            settings = settings.under(_read_override(text))
    if mistakes is None:
        found.refuse()
    return settings


def with_name(overrides: list[str], name: str | None) -> list[str]:
    """The overrides with the run's name that --name gives; None: it was not given."""
    return overrides if name is None else [*overrides, f"run.name={json.dumps(name)}"]


def is_override(text: str) -> bool:
    """Whether a text is written as a change to a recipe: section.key=value."""
    return re.match(r"[A-Za-z_]\w*(\.\w+)*=", text) is not None


def key_of(text: str) -> tuple[str, ...]:
    """The key that an override changes: ("optimizer", "lr") of optimizer.lr=4.8."""
    path = text.partition("=")[0]
    return tuple(SHORT.get(path, path).split("."))


def _read_override(text: str) -> Settings:
    path, equals, value_text = text.partition("=")
    shown = text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…"
    names = key_of(text)
    if not equals or not all(name and name == name.strip() for name in names):
        raise UserError(f"override '{shown}' is not of the form section.key=value, such as optimizer.lr=4.8")
    if not value_text.strip():
        raise UserError(f"override '{text}' has no value; write {path}=null for none")
    source = f"override '{shown}'"
    value, inner = _read_value(value_text, source)

    key: Key = names
    origins = {key[:n]: source for n in range(1, len(key))} | {(*key, *rest): source for rest in inner}
    tree: dict[str, Any] = {names[-1]: value}
    for name in reversed(names[:-1]):
        tree = {name: tree}
    return Settings(tree, origins)


def _read_value(text: str, source: str) -> tuple[Any, dict[Key, str]]:
    """A value and the origins in it: a list, a mapping or text in quotes as YAML reads them; a number, true, false or
    null; else the text itself. YAML would cut that off at " #", and take "folder:a: b" for a mapping.

    Raises UserError for broken YAML, and where something stands after a list, a mapping or quotes.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{source} has bytes that are not UTF-8, which no recipe can hold; rename what it names"
        ) from None
    if text.lstrip()[0] in "[{\"'":
        value, inner = parse(text, source, lines=False)
        refuse_rest(text, source)
        return value, inner
    plain = text, {(): source}
    if text.strip() in NULL:
        return None, {(): source}
    try:
        value, inner = parse(text, source, lines=False)
    except ValueError:  # such as "@photos", which YAML keeps for itself; or a number of thousands of digits
        return plain
    return (value, inner) if isinstance(value, bool | int | float) else plain


def refuse_rest(text: str, source: str) -> None:
    """Raises UserError where the YAML in a text ends before the text does: YAML takes the rest for a comment."""
    rest = text[yaml.compose(text, Loader=yaml.SafeLoader).end_mark.index :].strip()
    if rest:
        raise UserError(f"{source}: '{rest}' after the value would be left out; put quotes around the whole value")
