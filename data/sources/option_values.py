"""Values of options that are arguments of classes and functions: numbers, true and false, texts."""

import re

_WHOLE, _DECIMAL = re.compile(r"[+-]?\d+"), re.compile(r"[+-]?(\d+\.\d*|\.\d+|\d+(?=e))(e[+-]?\d+)?", re.IGNORECASE)
_WORDS = {"true": True, "false": False, "none": None, "null": None}


def value_of_option(text: str) -> bool | int | float | str | None:
    """A whole number, a decimal one, true, false or null where the text is one, in any case; else the text."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _DECIMAL.fullmatch(text) else text
