"""Finds recipes by name or path, and reads them with the recipes that they extend. Loads no torch."""

from collections.abc import Iterator
from pathlib import Path

from kilobatch import configs
from kilobatch.data.errors import UserError, did_you_mean
from kilobatch.launch.recipes.settings import Settings, format_path, format_value, read_file

FOLDER = Path(configs.__file__).resolve().parent  # of a checkout, not the link to it under src/


def recipe_names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def is_path(name: str) -> bool:
    """Whether a user means a YAML file by this text, not the name of something."""
    return name.endswith((".yaml", ".yml")) or "/" in name


def locate(name: str, near: Path = FOLDER) -> Path:
    """The file of a recipe, given as a name (`demo`) or as a path to a YAML file.

    near: the folder that a relative path in an `extends` starts from; names are looked for there, then in configs/.
    Raises UserError where there is no such file; for a name, with the nearest one that exists.
    """
    if is_path(name):
        path = near / name
        if not path.exists():
            raise UserError(f"there is no recipe file {format_path(path)}")
        return path
    for folder in (near, FOLDER):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise UserError(
        f"there is no recipe '{name}'{did_you_mean(name, recipe_names())} (kilobatch recipes lists them; "
        "or give a path to a YAML file)"
    )


def read_settings(name: str) -> Settings:
    """A recipe's own settings laid over those of the recipes that it extends.

    Raises UserError for an unreadable file, an unknown recipe and a circle of `extends`.
    """
    chain = list(_chain(locate(name, near=Path() if is_path(name) else FOLDER)))
    settings = Settings()
    for extending in reversed(chain):
        settings = settings.under(extending)
    settings.origins[()] = chain[0].origins[()]
    return settings


def _chain(path: Path) -> Iterator[Settings]:
    """The settings of the recipe, of the one that it extends, and so on."""
    seen: list[Path] = []
    while True:
        seen.append(path.resolve())
        settings = read_file(path)
        parent = settings.values.pop("extends", None)
        origin = settings.origins.pop(("extends",), "")
        yield settings
        if not origin:
            return
        if not isinstance(parent, str):
            raise UserError(f"{origin}: extends is {format_value(parent)}; name one recipe or one YAML file")
        try:
            path = locate(parent, near=path.parent)
        except UserError as error:
            raise UserError(f"{origin}: extends: {error}") from error
        if path.resolve() in seen:
            circle = " -> ".join(p.name for p in [*seen[seen.index(path.resolve()) :], path])
            raise UserError(f"{origin}: extends goes in a circle: {circle}")


def opening(name: str) -> list[str]:
    """The comment lines that a recipe opens with: what it reproduces, its command, cost and expected result."""
    lines = []
    for line in locate(name, near=Path() if is_path(name) else FOLDER).read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# yaml-language-server"):
            lines.append(line.removeprefix("#").strip())
    return lines
