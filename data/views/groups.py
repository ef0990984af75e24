"""Groups of views: several sizes from one decoded image. Each group is as the section `data.views` describes one."""

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Discriminator, Tag

from kilobatch.data.views.options import Views

MOST_VIEWS = 256  # of an image, over all groups


def alike(groups: Sequence[Views]) -> tuple[Views, ...]:
    """The groups, where those without a mean and std of their own have the first's. Raises ValueError for others:
    one network takes all of them, and evaluators prepare images by the first."""
    if not groups:
        raise ValueError("there is no group of views; give one at least")
    first, found = groups[0], [groups[0]]
    for number, group in enumerate(groups[1:], 1):
        shared = {name: getattr(first, name) for name in ("mean", "std")}
        for name, value in shared.items():
            own = getattr(group, name)
            if name in group.model_fields_set and own != value:
                raise ValueError(
                    f"{name} of group {number} is {[*own]}, and that of group 0 is {[*value]}; all groups are "
                    f"normalised alike: leave it out in all but the first"
                )
        found.append(group if group.mean == first.mean and group.std == first.std else group.model_copy(update=shared))
    for number, group in enumerate(groups):
        if group.by_patch and len(groups) > 1:
            raise ValueError(
                f"group {number} has second.by_patch, whose jigsaw is one of two views alone; use one group, or false"
            )
    if (total := sum(group.count for group in groups)) > MOST_VIEWS:
        raise ValueError(f"the groups have {total} views of an image together; use at most {MOST_VIEWS}")
    return tuple(found)


def _form(given: Any) -> str:
    return "groups" if isinstance(given, list | tuple) else "group"


# One mapping, or a list of them; by its form, so that a message is about the one that was meant.
ViewOptions = Annotated[
    Annotated[Views, Tag("group")] | Annotated[Annotated[tuple[Views, ...], AfterValidator(alike)], Tag("groups")],
    Discriminator(_form),
]
ViewGroups = Views | Sequence[Views]


def groups_of(views: ViewGroups) -> tuple[Views, ...]:
    """One group or several, as a tuple. Raises ValueError for groups that do not go together."""
    return (views,) if isinstance(views, Views) else alike(views)


def largest_side(views: ViewGroups) -> int:
    """Pixels of a side of the largest views: images have to be stored for these."""
    return max(group.size for group in groups_of(views))


def pixels_of_views(views: ViewGroups) -> int:
    """Pixels of all views of one image."""
    return sum(group.count * group.size**2 for group in groups_of(views))


def plans_of(groups: Sequence[Views]) -> NDArray[np.float32]:
    """(views, columns.COLUMNS): the plan of each view of an image, group by group."""
    return np.concatenate([group.plans() for group in groups])


def rows_of(groups: Sequence[Views]) -> NDArray[np.int64]:
    """(views, columns.ROW_COLUMNS): the size of each view of an image, and where it lies in a batch of all groups."""
    rows, before = [], 0
    for group in groups:
        elements, first = 3 * group.size**2, len(rows)
        each = group.count * elements
        rows += [(group.size, group.filter, first, before, each, view * elements) for view in range(group.count)]
        before += each
    return np.array(rows, np.int64)
