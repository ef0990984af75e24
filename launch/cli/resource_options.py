"""The fields of launch.jobs.cluster.Cluster as options of a command."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kilobatch.launch.jobs.cluster import Cluster, flag

_PANEL = "Resources, instead of cluster.yaml's"


def with_resources(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which takes `**resources`, with an option for each field, None or [] where it is not given."""
    own = inspect.signature(command)
    fixed = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
    options = [_option(name) for name in Cluster.model_fields]
    parameters = fixed + options

    def called(**arguments: Any) -> None:
        command(**arguments)

    called.__name__, called.__doc__ = command.__name__, command.__doc__
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    setattr(called, "__signature__", own.replace(parameters=parameters))  # noqa: B010, typer reads it
    return called


def _option(name: str) -> inspect.Parameter:
    """Checked by the model, with the file's; here only numbers are told from text."""
    field = Cluster.model_fields[name]
    kinds = [kind for kind in (int, float) if kind in (field.annotation, *getattr(field.annotation, "__args__", ()))]
    several = name in ("extra", "setup")
    kind = list[str] | None if several else (kinds[0] if kinds else str) | None
    option = typer.Option(flag(name), help=field.description, rich_help_panel=_PANEL, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
