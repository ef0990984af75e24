"""What a recipe may ask of CLIP's learnt temperature. Without torch, so that a recipe is validated without it."""

from typing import Annotated

from kilobatch.data.errors import Refusal
from kilobatch.methods.options import Beside

LARGEST_SCALE = 100  # of similarities, 1 / temperature, once learnt: Radford et al. 2021, section 2.5


class WithRoom:
    def fits(self, value: bool, beside: Beside) -> None:
        if value:
            refuse_beyond(beside.method.temperature)


Learnt = Annotated[bool, WithRoom()]


def refuse_beyond(temperature: float) -> None:
    """Raises Refusal for a temperature that is to be learnt and begins below where one ends."""
    if temperature < 1 / LARGEST_SCALE:
        raise Refusal(
            f"method.temperature is {temperature:g}, and one that is learnt ends at {1 / LARGEST_SCALE:g}; begin there "
            "or above (CLIP: 0.07), or use method.learn_temperature=false"
        )
