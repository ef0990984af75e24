"""Adds the fields of launch.jobs.cluster.Cluster to a command as options, with the fields' descriptions as help."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from kilobatch.launch.jobs.cluster import Cluster, flag

_PANEL = "Resources of the job (each replaces the value in cluster.yaml)"


def with_resources(command: Callable[..., None]) -> Callable[..., None]:
    """The command, which takes `**resources`, with an option for each field. An option that is not given is None or
    []."""
    own = inspect.signature(command)
    fixed = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    options = [_option(name) for name in Cluster.model_fields]
    parameters = fixed + options

    def wrapper(**arguments: Any) -> None:
        command(**arguments)

    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    setattr(wrapper, "__signature__", own.replace(parameters=parameters))  # noqa: B010, typer reads it
    return wrapper


def _option(name: str) -> inspect.Parameter:
    """An option that is an int, a float or text. All other checks are the model's, which also checks cluster.yaml."""
    field = Cluster.model_fields[name]
    kinds = [kind for kind in (int, float) if kind in (field.annotation, *getattr(field.annotation, "__args__", ()))]
    several = name in ("extra", "setup")
    kind = list[str] | None if several else (kinds[0] if kinds else str) | None
    option = typer.Option(flag(name), help=field.description, rich_help_panel=_PANEL, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
