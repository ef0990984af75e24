"""What fine-tuning can keep of a projection head. Without torch, so that a recipe is validated without it."""

from typing import Annotated

from pydantic import Field

from kilobatch.data.refusal import Refusal
from kilobatch.methods.beside_options import Beside


class OfTheLast:
    def fits(self, value: int | None, beside: Beside) -> None:
        if value is not None and beside.method.layer == 0:
            raise Refusal(
                f"method.dim is {value}, the width of a head's last layer, but method.layer is 0, which keeps none; "
                "leave method.dim out"
            )


LastDim = Annotated[Annotated[int, Field(gt=0)] | None, OfTheLast()]


def refuse_layers(layer: int, dim: int | None, start: str, there: int, makes: int | None) -> None:
    """Raises Refusal where a fine-tuning that keeps `layer` layers, the last of `dim` projections (None: all hidden),
    cannot begin with `start`, whose head has so many `there`, the last of `makes` projections (None: all hidden).
    """
    head = f"the head of method.start '{start}'"
    if layer > there:
        use = f"method.layer={there}" + (f" method.dim={makes}" if makes else "")
        raise Refusal(
            f"method.layer is {layer}, but method.start '{start}' has {there} layers of a projection head; use {use}"
        )
    wanted = makes if layer == there else None
    if dim == wanted:
        return
    if dim is None:
        raise Refusal(
            f"method.layer {layer} is the last of {head}: it makes projections of {wanted} dimensions, and has neither "
            f"bias nor ReLU; use method.dim={wanted} to keep it, or method.layer={layer - 1}"
        )
    if wanted:
        raise Refusal(f"method.dim is {dim}, but {head} makes projections of {wanted}; use method.dim={wanted}")
    last = f", or use method.layer={there} method.dim={makes}" if makes else ""
    raise Refusal(
        f"method.dim is {dim}, the width of a head's last layer, but layer {layer} of {head} is a hidden one; leave "
        f"method.dim out{last}"
    )
