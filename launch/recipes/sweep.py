"""Turns `--sweep optimizer.lr=0.3,0.6 --sweep seed=0,1` into the overrides of each of its points."""

import re
from dataclasses import dataclass
from itertools import product

import yaml

from kilobatch.data.errors import UserError
from kilobatch.launch.recipes import overrides
from kilobatch.launch.recipes.settings import parse


@dataclass(frozen=True)
class Point:
    """name: of its folder, such as `3-lr-0.6-seed-1`; changes: overrides, such as `optimizer.lr=0.6`."""

    name: str
    changes: list[str]


def points(sweeps: list[str]) -> list[Point]:
    """All combinations of the values; the last key varies fastest. Raises UserError for a text that is no sweep."""
    axes = [_axis(text) for text in sweeps]
    keys = [key for key, _ in axes]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--sweep {key} stands twice; give all its values in one: {key}=a,b,c")
    combinations = list(product(*(values for _, values in axes)))
    width = len(str(len(combinations) - 1))
    return [
        Point(
            name=_folder_name(f"{k:0{width}}", keys, combination),
            changes=[f"{key}={value}" for key, value in zip(keys, combination, strict=True)],
        )
        for k, combination in enumerate(combinations)
    ]


def _axis(sweep: str) -> tuple[str, list[str]]:
    """The key, and its values as they were written. A comma within brackets or quotes does not separate values."""
    key, _, text = sweep.partition("=")
    sweep = sweep if len(sweep) <= overrides.SHOWN else f"{sweep[: overrides.SHOWN - 1]}…"
    key = overrides.SHORT.get(key, key)
    listed = f"[{text}]"
    values, _ = parse(listed, f"--sweep {sweep}", lines=False)
    if not values or not isinstance(values, list) or not text.strip():
        raise UserError(f"--sweep {sweep} has no values; write it as optimizer.lr=0.3,0.6,1.2")
    overrides.refuse_rest(listed, f"--sweep {sweep}")
    nodes = yaml.compose(listed, Loader=yaml.SafeLoader).value  # a list, since `parse` above has read one
    texts = [listed[node.start_mark.index : node.end_mark.index] for node in nodes]
    for n, value in enumerate(values):
        if value in values[:n]:
            raise UserError(f"--sweep {sweep}: {texts[n]} stands twice")
        overrides.read_overrides([f"{key}={texts[n]}"])  # raises UserError for a key that is not section.key
    return key, texts


def _folder_name(number: str, keys: list[str], values: tuple[str, ...]) -> str:
    parts = [part for key, value in zip(keys, values, strict=True) for part in (key.rpartition(".")[2], value)]
    return "-".join([number, *(re.sub(r"[^A-Za-z0-9._-]+", "_", part).strip("_") for part in parts)])[:100]
