"""Fonts for the names in pictures: any name is drawn as the text that it is, in installed fonts that have its letters.

matplotlib's own font, DejaVu Sans, has Latin, Greek, Cyrillic, Arabic and Hebrew letters, but no Chinese or Thai ones.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from rich.cells import cell_len, set_cell_size

from kilobatch.data.errors import warn
from kilobatch.data.sources.path_names import printable

OWN = "DejaVu Sans"
NO_LETTERS = ("lastresort", "adobeblank")  # begin the names of fonts that have the same box for all letters
# The first word of letters' names in Unicode, where Noto has one font for several scripts.
CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "IDEOGRAPHIC", "FULLWIDTH", "HALFWIDTH", "KANGXI")


@dataclass(frozen=True)
class Typeface:
    """The fonts that names are drawn in. families: for matplotlib, in order; absent: letters that none of them has."""

    families: tuple[str, ...]
    absent: frozenset[str]

    def settings(self) -> Mapping[str, Any]:
        """matplotlib's settings by which `$` and `_` are letters like others."""
        return {"font.family": list(self.families), "text.parse_math": False, "text.usetex": False}

    def text(self, name: str, most: int) -> str:
        """A name on one line of at most `most` columns (a Chinese letter takes two), cut in the middle, as names often
        differ at their ends; a letter that no font has is written as its code point, such as U+4E2D, and left out where
        it has no shape anyway."""
        letters = [letter if letter not in self.absent else _code_point(letter) for letter in printable(name)]
        text = "".join(letters).strip() or "''"
        if cell_len(text) <= most:
            return text
        end = set_cell_size(text[::-1], (most - 1) // 2)[::-1].lstrip()
        while end and unicodedata.combining(end[0]):  # an accent whose letter was cut off
            end = end[1:]
        return set_cell_size(text, most // 2).rstrip() + "…" + end


def typeface_for(names: Iterable[str]) -> Typeface:
    """The fonts for these names: matplotlib's own and, where that lacks letters, installed ones that have them.

    Warns of letters that no installed font has, once in a process, and says which fonts to install.
    """
    from matplotlib.font_manager import FontProperties, fontManager

    letters = {letter for name in names for letter in printable(name)}
    own = [fontManager.findfont(FontProperties(family=[OWN], weight=weight)) for weight in ("normal", "bold")]
    missing = letters - frozenset.intersection(*(_letters_in(file, frozenset(letters)) for file in own))
    families = [OWN]
    if missing:
        files = _installed()
        while missing:
            has = {file: _letters_in(file, frozenset(missing)) for file in files}
            best = max(files, key=lambda file: len(has[file]), default=None)
            if best is None or not has[best]:
                break
            families.append(_family_of(best))
            missing -= has[best]
            files = [file for file in files if has[file]]
        _warn_of_missing("".join(sorted(missing)))
    return Typeface(tuple(families), frozenset(missing))


def _letters_in(file: str, letters: frozenset[str]) -> frozenset[str]:
    """Those of the letters that a font can draw. Fonts of coloured bitmaps cannot be opened at any size."""
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(file)
        font.set_size(10, 100)
        return frozenset(letter for letter in letters if font.get_char_index(ord(letter)) and _has_shape(font, letter))
    except (RuntimeError, OSError, ValueError):
        return frozenset()  # a damaged font is not this program's concern: another one may have the letters


def _has_shape(font: Any, letter: str) -> bool:
    """Whether the letter is more than an empty box, which some fonts have for letters that others draw in colours."""
    return unicodedata.category(letter)[0] in "ZC" or font.load_char(ord(letter)).width > 0


def _installed() -> list[str]:
    """The files of the fonts that are installed now; matplotlib's own list is kept from when it was first used."""
    import matplotlib
    from matplotlib.font_manager import findSystemFonts, fontManager

    own = Path(matplotlib.get_data_path())
    listed = {font.fname for font in fontManager.ttflist} | {*findSystemFonts()}
    files = [file for file in sorted(listed) if own not in Path(file).parents]
    return [file for file in files if not Path(file).stem.lower().replace("-", "").startswith(NO_LETTERS)]


@cache
def _family_of(file: str) -> str:
    """A family that has this font for every weight. By the font's own name matplotlib might choose another file of its
    family, without the letters."""
    from matplotlib.font_manager import FontEntry, fontManager

    name = f"kilobatch {file}"
    fontManager.ttflist.append(replace(FontEntry(), fname=file, name=name, weight=400, size="scalable"))
    return name


def _has_no_shape(letter: str) -> bool:
    """Whether the letter only says how its neighbours are drawn: joiners, marks of direction, and the selectors of
    variants, such as the one that asks for an emoji in colours."""
    return unicodedata.category(letter) == "Cf" or "VARIATION SELECTOR" in unicodedata.name(letter, "")


def _code_point(letter: str) -> str:
    return "" if _has_no_shape(letter) else f"U+{ord(letter):04X} "


@cache
def _warn_of_missing(missing: str) -> None:
    """Says which fonts to install for letters; not for control characters and the like, which none has."""
    letters = "".join(x for x in missing if unicodedata.category(x)[0] != "C" and not _has_no_shape(x))
    scripts = sorted({*map(_font_for, letters)})
    if scripts:
        shown = " ".join(f"{letter} (U+{ord(letter):04X})" for letter in letters[:5])
        more = f" and {len(letters) - 5:,} more letters" if len(letters) > 5 else ""
        warn(
            f"no installed font has {shown}{more} of names in the picture, which shows their code points instead; "
            f"install {', '.join(scripts)} and draw it again"
        )


def _font_for(letter: str) -> str:
    script = unicodedata.name(letter, "SYMBOL").split()[0].split("-")[0]
    if script in CJK:
        return "Noto Sans CJK (Debian: fonts-noto-cjk)"
    if unicodedata.category(letter)[0] == "S":
        return "Noto Emoji or Symbols (Debian: fonts-noto)"
    return f"Noto Sans {script.title()} (Debian: fonts-noto-core)"
