"""UserError, the exception for errors that a user can correct; spelling help for its messages; warnings."""

import difflib
import sys
from collections.abc import Iterable


class UserError(ValueError):
    """An error in the input or the environment, which the user can correct.

    Its text is the whole message: what is wrong, its value, what is allowed, the way out. The command line prints
    it without a traceback and exits with code 2.
    """


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Returns "; did you mean 'temperature'?" for the nearest allowed name, else the allowed names themselves."""
    allowed = sorted(allowed)
    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(allowed)}"


def warn(message: str) -> None:
    """Prints a warning of one line on stderr, at once."""
    print(f"kilobatch: warning: {message}", file=sys.stderr, flush=True)
