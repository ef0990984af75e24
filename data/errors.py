"""The one exception for what a user can mend, and the spelling help that its messages give."""

import difflib
from collections.abc import Iterable


class Refusal(ValueError):
    """Input or surroundings that a user can mend.

    Its text is the whole message: what is wrong, its value, what is allowed, the way out. The command line prints
    it without a traceback and exits with code 2.
    """


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Returns "; did you mean 'temperature'?" for the nearest allowed name, else the allowed names themselves."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(allowed)}"
