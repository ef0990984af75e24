"""UserError, the exception for errors that a user can correct; several of them at once; spelling help; warnings."""

import difflib
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """An error in the input or the environment, which the user can correct.

    Its text is the whole message: what is wrong, its value, what is allowed, the way out. The command line prints
    it without a traceback and exits with code 2.
    """


class Mistakes:
    """Mistakes that do not depend on each other, so that a user sees all of them at once and not one after another.

    messages: what was noted so far, each once.
    """

    def __init__(self) -> None:
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        self.messages += [line for line in _separate(message) if line not in self.messages]

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes the UserError that ends the block; `refuse` raises it."""
        try:
            yield
        except UserError as error:
            self.add(str(error))

    def refuse(self) -> None:
        """Raises UserError where something was noted: a single message as it is, several with each on a line."""
        if len(self.messages) == 1:
            raise UserError(self.messages[0])
        if self.messages:
            raise UserError("\n  ".join([f"{len(self.messages)} mistakes:", *self.messages]))


def _separate(message: str) -> list[str]:
    """The mistakes in a message that Mistakes.refuse has made; else the message alone."""
    first, *others = message.split("\n  ")
    return others if first == f"{len(others)} mistakes:" else [message]


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Returns "; did you mean 'temperature'?" for the nearest allowed name, else the allowed names themselves."""
    allowed = sorted(allowed)
    near = nearest(name, allowed)
    return f"; did you mean '{near}'?" if near else f"; known: {', '.join(allowed)}"


def choices(name: str, allowed: Iterable[str]) -> str:
    """Returns "; did you mean 'h100'? known: a100, h100": the nearest name and all of them, where there are few."""
    near, known = nearest(name, allowed := list(allowed)), f"known: {', '.join(allowed)}"
    return f"; did you mean '{near}'? {known}" if near else f"; {known}"


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """The allowed name that is nearest to this one, whatever its case; None: none is near."""
    by_sense = {other.casefold(): other for other in allowed}
    near = difflib.get_close_matches(name.casefold(), by_sense, n=1, cutoff=0.6)
    return by_sense[near[0]] if near else None


def warn(message: str) -> None:
    """Prints a warning of one line on stderr, at once."""
    print(f"kilobatch: warning: {message}", file=sys.stderr, flush=True)
