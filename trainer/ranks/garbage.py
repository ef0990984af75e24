"""Python's garbage collection in a worker: off while it imports and builds, and never of what it has then."""

import atexit
import gc


def collect_later() -> None:
    """Switches it off: it takes a sixth of the time of a worker's imports, and finds nothing."""
    gc.disable()


def collect_from_now_on() -> None:
    """Switches it on where it was off. What is there by now, a quarter of a million objects of the imports, is left
    alone for good: to look through them takes 0.3 s, at any time and so in the middle of a step."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or libraries' bindings report what is left at the end as lost
