"""`kilobatch options`: every option of a recipe with type, bounds, default and meaning, for the terminal and as
docs/options.md. All of it is read from the JSON schema."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.launch.recipes import method_options
from kilobatch.launch.recipes.recipe import Recipe, schema
from kilobatch.launch.recipes.settings import format_value
from kilobatch.methods.source_file import is_source

UNIONS = ("anyOf", "oneOf", "allOf")
LINE = 120  # characters of a line in documents
NAMES = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "null": "null"} | {
    "object": "mapping"
}
HEAD = """\
# Every option of a recipe

`kilobatch options` prints this, `kilobatch options data.views` or `kilobatch options simclr` a part of it. It is
generated from where the options are declared:

    WRITE_OPTIONS=1 .venv/bin/python -m pytest tests/launch/cli/test_options.py

An option is set in a recipe's YAML file, or by `section.key=value` on the command line. `null` means none. What a
recipe does not set comes from the recipe that it `extends`, and then from the defaults given here.
"""


@dataclass(frozen=True)
class Option:
    """An option of a recipe. key: dotted; kind: its type with bounds, in words; default: as YAML, "" for a section that
    has the defaults of its options, None where it has to be given."""

    key: str
    kind: str
    default: str | None
    meaning: str

    def heading(self) -> str:
        default = ", to be given" if self.default is None else f", default {self.default}" if self.default else ""
        return f"{self.kind}{default}"


def all_options(further: Sequence[str] = ()) -> dict[str, list[Option]]:
    """The options of each section, and those of each method by the method's name, in the order of their declaration.
    further: methods as FILE.py:Class."""
    found = schema(further)
    named, sections = found["$defs"], {}
    for section in Recipe.model_fields:
        if section != "method":
            model = named[str(_reference(found["properties"][section])).rpartition("/")[2]]
            sections[section] = list(_options(section, model, named, {}, {}))
    methods = {name: method_options.model_name(name) for name in (*method_options.method_names(), *further)}
    return sections | {name: list(_options("method", named[model], named, {}, {})) for name, model in methods.items()}


def print_options(section: str | None) -> None:
    """Prints all options, those of a section or a part of it (data.views), or those of a method (simclr, or
    FILE.py:Class).

    Raises UserError for a section or a method that there is not.
    """
    further = [section] if section is not None and is_source(section) else []
    options, methods = all_options(further), [*method_options.method_names(), *further]
    wanted = options
    if section == "method":
        wanted = {name: options[name] for name in methods}
    elif further:
        wanted = {name: options[name] for name in further}
    elif section is not None:
        name = section.removeprefix("method.").partition(".")[0]
        inner = section.removeprefix(f"method.{name}").removeprefix(name) if name in methods else ""
        prefix = f"method{inner}" if name in methods else section
        part = [o for o in options.get(name, ()) if o.key == prefix or o.key.startswith(f"{prefix}.")]
        if not part:
            known = [*Recipe.model_fields, *methods, *(o.key for o in options.get(name, ()))]
            raise UserError(f"there are no options of '{section}'{did_you_mean(section, known)}")
        wanted = {name: part}
    for name, part in wanted.items():
        if name in methods:
            print(f"method: {{name: {name}}}")
        for option in part:
            print(f"{option.key} ({option.heading()})\n    {option.meaning}")
        print()


def as_document() -> str:
    """The text of docs/options.md."""
    options, methods = all_options(), method_options.method_names()
    names = [f"[{name}](#{name})" for name in Recipe.model_fields]
    lines = [HEAD, *textwrap.wrap(f"Sections: {', '.join(names)}.", LINE), ""]
    for name in Recipe.model_fields:
        lines += [f"## {name}", ""]
        if name != "method":
            lines += [*_items(options[name]), ""]
        for method in methods if name == "method" else ():
            lines += [f"### method: {method}", "", *_items(options[method]), ""]
    return "\n".join(lines[:-1]) + "\n"


def _items(options: list[Option]) -> Iterator[str]:
    for option in options:
        text = f"- `{option.key}` ({option.heading()}): {option.meaning}"
        yield from textwrap.wrap(text, LINE, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _options(
    prefix: str, model: dict[str, Any], named: dict[str, Any], default: dict[str, Any], seen: dict[str, str]
) -> Iterator[Option]:
    """The options of a model. default: what they are where they are left out with all of the model; seen: the key at
    which each model was listed, as a second listing refers to it."""
    for name, described in model["properties"].items():
        key = f"{prefix}.{name}"
        inner, value = _model(described, named), default.get(name, described.get("default", ...))
        meaning = described.get("description", "")
        reference = _reference(described)
        if reference in seen:
            meaning += f"; its options: as {seen[reference]}'s"
        shown = None if value is ... else "" if inner and isinstance(value, dict) else format_value(_short(value))
        yield Option(key, _kind(described, named), shown, meaning)
        if inner is not None and reference not in seen:
            seen[reference or key] = key
            yield from _options(key, inner, named, value if isinstance(value, dict) else {}, seen)


def _short(value: Any) -> Any:
    """A default with four digits of its numbers: 1.3333333333333333 says no more than 1.333."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _reference(described: dict[str, Any]) -> str | None:
    """The model that an option holds, if it holds one."""
    parts = [described, *(part for union in UNIONS for part in described.get(union, ()))]
    return next((part["$ref"] for part in parts if "$ref" in part), None)


def _model(described: dict[str, Any], named: dict[str, Any]) -> dict[str, Any] | None:
    reference = _reference(described)
    found = None if reference is None else named[reference.rpartition("/")[2]]
    return found if found and "properties" in found else None


def _kind(described: dict[str, Any], named: dict[str, Any]) -> str:
    """The type and the bounds of a value, in words."""
    if "$ref" in described:
        inner = named[described["$ref"].rpartition("/")[2]]
        return "section" if "properties" in inner else _kind(inner, named)
    for union in UNIONS:
        if union in described:
            return " or ".join(dict.fromkeys(_kind(part, named) for part in described[union]))
    if "const" in described or "enum" in described:
        return " | ".join(map(format_value, described.get("enum", [described.get("const")])))
    if described["type"] == "array":
        parts = [_kind(part, named) for part in described.get("prefixItems", [described.get("items", {})])]
        many = parts[0].replace("number", "numbers").replace("integer", "integers").replace("section", "sections")
        assert len({*parts}) == 1, described  # all pairs and triples are of one kind
        return f"{len(parts) if 'prefixItems' in described else 'list of'} {many}"
    return NAMES[described["type"]] + _bounds(described)


def _bounds(described: dict[str, Any]) -> str:
    low, high = described.get("minimum"), described.get("maximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    parts = [
        f"{word} {described[bound]:g}" for bound, word in words.items() if bound in described and described[bound] < 1e9
    ]
    return f" {' and '.join(parts)}" if parts else ""
