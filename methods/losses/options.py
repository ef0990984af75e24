"""Options of losses: a learnt temperature, as CLIP has it, and the entropy of assignments. Loads no torch."""

from typing import Annotated

from kilobatch.data.errors import UserError
from kilobatch.methods.options import OptionContext

SINKHORN_EPSILON = 0.024  # the least; e^(-2 / epsilon) is then 6e-37, which fp32 still has
LARGEST_SCALE = 100  # the most that 1 / temperature is learnt to be: Radford et al. 2021, section 2.5


class AboveFinalTemperature:
    """Constraint of learn_temperature: method.temperature is at least 1 / LARGEST_SCALE."""

    def check(self, value: bool, context: OptionContext) -> None:
        if value:
            refuse_small_temperature(context.method.temperature)


LearnTemperature = Annotated[bool, AboveFinalTemperature()]


def refuse_small_temperature(temperature: float) -> None:
    """Raises UserError if a temperature that is learnt would start below the least that it may become."""
    if temperature < 1 / LARGEST_SCALE:
        raise UserError(
            f"method.temperature is {temperature:g}, and one that is learnt ends at {1 / LARGEST_SCALE:g}; begin there "
            "or above (CLIP: 0.07), or use method.learn_temperature=false"
        )
