"""Reads the changes that the command line makes in a recipe: `section.key=value`, the value as YAML."""

from collections.abc import Sequence
from typing import Any

import yaml

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes.settings import Key, Settings, parse

SHORT = {"seed": "run.seed"}  # keys that may be written without their section
NULL = ("null", "~")


def read_overrides(overrides: Sequence[str]) -> Settings:
    """All overrides as one tree; a later one wins. Raises UserError for a text that is not `section.key=value`."""
    settings = Settings()
    for text in overrides:
        settings = settings.under(_read_override(text))
    return settings


def _read_override(text: str) -> Settings:
    path, equals, value_text = text.partition("=")
    names = SHORT.get(path, path).split(".")
    if not equals or not all(name and name == name.strip() for name in names):
        raise UserError(f"override '{text}' is not of the form section.key=value, such as optimizer.lr=4.8")
    if not value_text.strip():
        raise UserError(f"override '{text}' has no value; write {path}=null for none")
    source = f"override '{text}'"
    value, inner = _read_value(value_text, source)

    key: Key = tuple(names)
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
