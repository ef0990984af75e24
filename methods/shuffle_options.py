"""When keys can be made in a shuffled order. Without torch, so that a recipe is validated without it."""

from typing import Annotated

from kilobatch.data.refusal import Refusal
from kilobatch.methods.beside_options import Beside
from kilobatch.methods.encoder_options import Mode

ALONE = (
    "method.shuffle is true, but one worker has nobody to shuffle with: its norms would still tell queries their keys; "
    "use more workers, or encoder.norm=global with method.shuffle=false and a large data.batch"
)
WHOLE = "method.shuffle is true, and mixes the whole batch of all ranks"


class Fits:
    def fits(self, value: bool, beside: Beside) -> None:
        refuse_global(value, beside.encoder.norm)
        if value and beside.workers == 1:
            raise Refusal(ALONE)
        if value and beside.chunks > 1:
            raise Refusal(f"{WHOLE}, but engine.chunks is {beside.chunks}; use engine.chunks=1")


def refuse_global(shuffle: bool, norm: Mode) -> None:
    """Raises Refusal where a shuffled order changes nothing."""
    if shuffle and norm == "global":
        raise Refusal(
            "method.shuffle is true, but encoder.norm is 'global': its statistics are the same in any order; "
            "use encoder.norm=local or method.shuffle=false"
        )


Shuffled = Annotated[bool, Fits()]
