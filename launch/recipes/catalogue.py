"""Where recipes lie, what they say of themselves, and what they extend. Loads no torch."""

from collections.abc import Iterator
from pathlib import Path

from kilobatch import configs
from kilobatch.data.errors import Refusal, did_you_mean
from kilobatch.launch.recipes.settings import Settings, read_file, shown, shown_path

FOLDER = Path(configs.__file__).resolve().parent  # of a checkout, not the link to it under src/


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def locate(name: str, near: Path = FOLDER) -> Path:
    """The file of a recipe, given as a name (`demo`) or as a path to a YAML file.

    near: the folder that a relative path in an `extends` starts from; names are looked for there, then in configs/.
    Raises Refusal for a name that is neither, with the nearest that is.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = near / name
        if not path.exists():
            raise Refusal(f"there is no recipe file {shown_path(path)}")
        return path
    for folder in (near, FOLDER):
        if (folder / f"{name}.yaml").is_file():
            return folder / f"{name}.yaml"
    raise Refusal(f"there is no recipe '{name}'{did_you_mean(name, names())} (or give a path to a YAML file)")


def read(name: str) -> Settings:
    """A recipe's own settings laid over those of the recipes that it extends.

    Raises Refusal for an unreadable file, an unknown recipe and a circle of `extends`.
    """
    chain = list(_chain(locate(name, near=Path() if "/" in name or name.endswith((".yaml", ".yml")) else FOLDER)))
    settings = Settings()
    for one in reversed(chain):
        settings = settings.under(one)
    settings.origins[()] = chain[0].origins[()]
    return settings


def _chain(path: Path) -> Iterator[Settings]:
    """The recipe, the one that it extends, and so on."""
    seen: list[Path] = []
    while True:
        seen.append(path.resolve())
        settings = read_file(path)
        parent = settings.values.pop("extends", None)
        where = settings.origins.pop(("extends",), "")
        yield settings
        if not where:
            return
        if not isinstance(parent, str):
            raise Refusal(f"{where}: extends is {shown(parent)}; name one recipe or one YAML file")
        try:
            path = locate(parent, near=path.parent)
        except Refusal as refusal:
            raise Refusal(f"{where}: extends: {refusal}") from refusal
        if path.resolve() in seen:
            circle = " -> ".join(p.name for p in [*seen[seen.index(path.resolve()) :], path])
            raise Refusal(f"{where}: extends goes in a circle: {circle}")


def opening(name: str) -> list[str]:
    """The comment lines that a recipe opens with: what it reproduces, its command, cost and expected result."""
    lines = []
    for line in locate(name).read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# yaml-language-server"):
            lines.append(line.removeprefix("#").strip())
    return lines
