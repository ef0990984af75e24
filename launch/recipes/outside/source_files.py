"""Files of users' own that a recipe names as FILE.py:NAME: an encoder's function, a method's class. Loads no torch."""

from collections.abc import Iterator, Mapping

from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.runs.identity import Change
from kilobatch.methods.source_file import absolute_source, is_source, parse_source, source_sha256

FILE_OF = "file of "  # before the option, in the name of a change


def sources(recipe: Recipe) -> dict[str, str]:
    """FILE.py:NAME by the option that has it."""
    names = {"encoder.name": recipe.encoder.name, "method.name": recipe.method.name}
    return {option: name for option, name in names.items() if is_source(name)}


def hashes(recipe: Recipe) -> dict[str, str]:
    """The SHA-256 of these files by option. Raises UserError where one cannot be read."""
    return {option: source_sha256(name) for option, name in sources(recipe).items()}


def with_absolute_sources(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths of these files."""
    encoder = recipe.encoder.model_copy(update={"name": absolute_source(recipe.encoder.name)})
    method = recipe.method.model_copy(update={"name": absolute_source(recipe.method.name)})
    return recipe.model_copy(update={"encoder": encoder, "method": method})


def content_changes(before: Mapping[str, str], recipe: Recipe) -> Iterator[Change]:
    """What differs between the files that a run began with, of which `before` has the SHA-256, and those of now."""
    for option, sha256 in hashes(recipe).items():
        if option in before and before[option] != sha256:
            old, new = f"SHA-256 {before[option][:12]}…", f"{sha256[:12]}…"
            yield Change(name=f"{FILE_OF}{option}", old=old, new=new)


def same_names(before: Recipe, recipe: Recipe) -> set[str]:
    """The options that name the same in a file then and now: of these the content is compared, and not the path."""
    then, now = sources(before), sources(recipe)
    return {key for key in then.keys() & now.keys() if parse_source(then[key]).name == parse_source(now[key]).name}
