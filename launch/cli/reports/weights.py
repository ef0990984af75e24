"""`kilobatch weights`: the encoders in a file of any package, and how a recipe starts with one."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from kilobatch.data.errors import UserError
from kilobatch.data.files import unreadable
from kilobatch.data.sources.path_names import printable
from kilobatch.launch.recipes import references
from kilobatch.launch.recipes.settings import format_value
from kilobatch.launch.runs.table_printing import print_lines, print_table

if TYPE_CHECKING:
    from kilobatch.methods.networks.options import EncoderOptions
    from kilobatch.methods.networks.weights.contents import HeldEncoder

OF_NETWORK = {"options", "stem", "width", "sk_ratio"}  # options by which a network is another one, beside its name


def print_weights(file: Path) -> None:
    """Prints a line for each encoder in the file, and the options that start a run with it.

    Raises UserError for a path that is no file, for what methods.networks.weights.state_file.read_places refuses, and
    where nothing in the file is an encoder.
    """
    if file.is_dir():
        raise UserError(
            f"{printable(str(file))} is a folder; name a file. Of a run or a checkpoint the place is known: "
            "encoder.start=RUN"
        )
    console = Console(emoji=False)
    try:
        own = not references.is_foreign(file) if file.exists() else False
        lines = _own_file(file) if own else _foreign_file(file, console)
    except OSError as error:
        raise UserError(unreadable(file, error)) from error
    print_lines(lines, console)


def _own_file(file: Path) -> list[str]:
    metadata = references.metadata_of(file)
    recipe = references.recipe_in(metadata, file)
    said = f"{printable(str(file))}: {metadata['content']} of a {metadata['method']} run of kilobatch"
    return [f"{said}, step {metadata['step']}, for {metadata['loads_into']}", _start(file, recipe.encoder)]


def _foreign_file(file: Path, console: Console) -> list[str]:
    from kilobatch.methods.networks.weights.contents import encoders_in
    from kilobatch.methods.networks.weights.formats import FORMATS
    from kilobatch.methods.networks.weights.state_file import read_places

    held = encoders_in(*read_places(file))
    if not held:
        raise UserError(f"{printable(str(file))} holds tensors, but no network's; name a file with a state dict")
    table = Table(title=printable(str(file)), title_justify="left")
    for column in ("encoder.start_prefix", "tensors", "network", "package"):
        table.add_column(column, overflow="fold", justify="right" if column == "tensors" else "left")
    for encoder in held:
        network = "none of kilobatch's own" if encoder.options is None else " ".join(_network(encoder.options))
        known = encoder.number < len(FORMATS) or encoder is held[0]
        package = encoder.package if known else "as above; taken only if it is named"
        table.add_row(printable(encoder.place), str(encoder.tensors), network, package)
    print_table(table, console)
    return _ways(file, held)


def _network(options: "EncoderOptions") -> list[str]:
    """The options of the network, as a recipe is given them."""
    changed = options.model_dump(mode="json", include=OF_NETWORK, exclude_defaults=True)
    if options.name.startswith("resnet") and options.width == 1:
        del changed["width"]
    return [f"encoder.{name}={format_value(value)}" for name, value in ({"name": options.name} | changed).items()]


def _start(file: Path, options: "EncoderOptions | None") -> str:
    network = ["encoder.name=NETWORK"] if options is None else _network(options)
    return f"kilobatch train RECIPE encoder.start={shlex.quote(printable(str(file)))} {' '.join(network)}"


def _ways(file: Path, held: "list[HeldEncoder]") -> list[str]:
    first, *others = held
    start, lines = _start(file, first.options), list[str]()
    if first.options is None:
        lines.append("NETWORK: timm/NAME, torchvision/NAME, or FILE.py:function; the file does not say which")
    if others and others[0].number == first.number:
        lines.append("encoder.start_prefix has to say which, since both lie where such a file has its encoder")
        start += f" encoder.start_prefix={first.place}"
    elif others:
        lines.append(f"It takes the first. For another: encoder.start_prefix={others[0].place}")
    return [start, *lines]
