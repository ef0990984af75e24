"""Calls the command line, and turns what it does not understand into one plain message: the command, the word, what is
allowed, the way out."""

import re
import sys
from pathlib import Path
from typing import Any

import typer

from kilobatch.data.errors import UserError, choices, nearest
from kilobatch.launch.cli.examples import EXAMPLES
from kilobatch.launch.recipes.overrides import is_override

# The base of all that the parser refuses. typer has click's classes within itself from some version on.
_REFUSED: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def call(app: typer.Typer, arguments: list[str] | None) -> None:
    """Calls a command line. Raises UserError for arguments that it does not understand, and SystemExit at the end."""
    try:
        code = app(arguments, standalone_mode=False)
    except _REFUSED as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed
            raise SystemExit(error.exit_code) from None
        raise UserError(_explain(error, sys.argv[1:] if arguments is None else arguments)) from None
    raise SystemExit(code or 0)


def refuse_override(context: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """The value of an argument that names something. Raises UserError where a change to a recipe stands in its place,
    and there is nothing of that name."""
    for text in value if isinstance(value, list) else [value]:
        if text is not None and is_override(text) and not any(Path(top, text).exists() for top in ("", "runs")):
            command, what = f"kilobatch {context.info_name}", (param.name or "").removesuffix("s").upper()
            takes = any(other.name == "overrides" for other in context.command.params)
            way_out = f"write it after that: {command} {what} {text}" if takes else f"{command} takes no such changes"
            raise UserError(f"'{text}' changes a recipe, and stands where {command} has its {what}; {way_out}")
    return value


def _explain(error: Any, words: list[str]) -> str:
    """words: of the command line."""
    context, message = getattr(error, "ctx", None), error.format_message()
    if context is None or context.parent is None:
        if unknown := re.match(r"No such command '(.*?)'", message, re.DOTALL):
            return _unknown_command(unknown[1], context)
        command = next((word for word in words if word in EXAMPLES), "COMMAND")
        return f"{_plain(message)}; kilobatch {command} --help lists the options of a command"
    name = context.info_name
    match type(error).__name__:
        case "NoSuchOption":
            return _unknown_option(error.option_name, context)
        case "MissingParameter":
            needed = error.param.name.upper()
            return f"kilobatch {name} needs {needed}, {_lower(error.param.help)} For example: {EXAMPLES[name][0]}"
        case "BadParameter":
            return f"kilobatch {name}: {_given(error.param.opts, words)}: {_plain(error.message)}"
    if extra := re.search(r"unexpected extra argument\S* \((.*)\)", message):
        return _unexpected(extra[1].split(" "), context)
    return f"kilobatch {name}: {_plain(message)}; {_help(name)}"


def _unknown_command(word: str, context: Any) -> str:
    if is_override(word):
        return f"'{word}' changes a recipe, and comes after it: kilobatch train RECIPE {word}"
    return f"there is no command '{word}'{choices(word, context.command.commands)}"


def _unexpected(words: list[str], context: Any) -> str:
    """words: those that the command has no place for."""
    name = context.info_name
    if changes := [word for word in words if is_override(word)]:
        return f"'{changes[0]}' changes a recipe, and kilobatch {name} takes no changes; {_takers(context)} do"
    places = [param.name.upper() for param in context.command.params if param.param_type_name == "argument"]
    return f"kilobatch {name} does not know what to do with '{words[0]}': it takes {' '.join(places)}; {_help(name)}"


def _given(options: list[str], words: list[str]) -> str:
    """An option with its value, as they were written."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        if name in options:
            return f"{name} is '{value if equals else after}'"
    return options[0]


def _unknown_option(option: str, context: Any) -> str:
    name, bare = context.info_name, option.lstrip("-").replace("-", "_")
    told = f"kilobatch {name} has no option {option}"
    takes_changes = any(param.name == "overrides" for param in context.command.params)
    if takes_changes and (keys := _recipe_keys(bare, "evaluate." if name == "eval" else "")):
        return (
            f"{told}; options of the recipe are written without dashes: {' or '.join(f'{key}=VALUE' for key in keys)}"
        )
    own = [opt for param in context.command.params for opt in param.opts if opt.startswith("--")]
    others = context.parent.command.commands.items()
    if having := [other for other, command in others if any(option in param.opts for param in command.params)]:
        return f"{told} (these have: {', '.join(having)}); {_help(name)}"
    near = nearest(option, own)
    return f"{told}; " + (f"did you mean '{near}'? " if near else "") + _help(name)


def _recipe_keys(name: str, section: str) -> list[str]:
    """The recipe's options that may be meant by a name: itself, or those that end with it, in a section or anywhere."""
    from kilobatch.launch.recipes import validation_errors
    from kilobatch.launch.recipes.recipe import Recipe

    if "." in name:
        return [name]
    keys = [path for path in validation_errors.paths(Recipe) if path.startswith(section)]
    return [path for path in keys if path.rpartition(".")[2] == name and "." in path][:3]


def _takers(context: Any) -> str:
    """The commands that take changes to a recipe."""
    commands = context.parent.command.commands.items()
    return ", ".join(name for name, command in commands if any(param.name == "overrides" for param in command.params))


def _plain(message: str) -> str:
    """pydantic's and click's wording as one clause."""
    message = re.sub(r"^Value error, '.*' is not one of", "it should be one of", message.rstrip("."))
    message = re.sub(r"^Input should be a valid (\w+), unable to parse .*", r"it should be a valid \1", message)
    return message.replace("Option '", "option '").replace("requires an argument", "needs a value")


def _help(name: str) -> str:
    return f"kilobatch {name} --help lists what it takes"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:] + ("" if text.endswith(".") else ".")
