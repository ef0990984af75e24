"""Adversarial views: a view moved against the loss, as a further view (engine.adversarial).

Ho and Vasconcelos 2020, arxiv.org/abs/2010.12050 (CLAE); authors' code: github.com/chihhuiho/CLAE. With views i and j:
x_adv = x_i + epsilon sign(d l(z_i, z_j) / d x_j at x_j = x_i), through norms of its own;
L = l(z_i, z_j) + weight l(z_i, z_adv), z_i and z_j through the clean norms.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks import batch_norm, keyed_layers
from kilobatch.trainer.options import AdversarialOptions

PREFIX = "adversarial "  # of the field with the view's pixels, and of the outputs that are made of it
PIXELS = PREFIX + "views"
NORMS = "adversarial_norms"

Embed = Callable[[Batch], Tensors]


def add_norms(method: Method) -> None:
    """Gives the method a second norm for each of its own, which adversarial views go through. They are trained and
    saved with it; evaluation and export use the clean ones. (The authors' projection head has no norm; here its norms
    are doubled as well.)"""
    method.add_module(NORMS, batch_norm.twins(method))


def own_norms(method: Method) -> AbstractContextManager[None]:
    """Lets the adversarial norms compute in place of the clean ones."""
    twins = method.get_submodule(NORMS)
    own = {id(norm) for norm in twins.children()}
    clean = [norm for norm in batch_norm.norms(method) if id(norm) not in own]
    return batch_norm.standing_in(clean, batch_norm.norms(twins))


class Attack:
    """The adversarial views of a rank's batch. Changes no gradient of a parameter and no running statistics.

    autocast: the engine's; scale: of gradients, so that fp16 holds them; only their signs count. The passes do not go
    through DeepSpeed, which allows no backward but its own.

    A sign amplifies rounding: where a gradient is nearly 0, other ranks or chunks may find the other sign, and the
    pixel moves by 2 epsilon. Pixels are those of the normalised image, and not clipped to its range, both as in the
    authors' code. There the adversarial norms' running statistics move in each of three passes of a step; here in the
    last.
    """

    def __init__(
        self,
        method: Method,
        options: AdversarialOptions,
        autocast: Callable[[], AbstractContextManager[object]],
        scale: float = 1.0,
    ) -> None:
        self.method, self.options, self.autocast, self.scale = method, options, autocast, scale

    def attacked(self, batch: Batch, t: Tensors, chunks: int) -> Batch:
        """The batch with its adversarial views as a further field, which is cut into chunks with the rest. t: the
        targets of the batch."""
        parts = [first_views(part) for part in batch.chunks(chunks)]
        with torch.set_grad_enabled(chunks == 1):  # of several chunks each is embedded again, for the memory of one
            starts = [self.start(part) for part in parts]
        gradient = self.gradient({name: torch.cat([z[name] for z in starts]) for name in starts[0]}, t, batch)
        by_chunk = {name: g.chunk(chunks) for name, g in gradient.items()}
        moved = [
            self.moved(part, starts[0] if chunks == 1 else None, {name: g[k] for name, g in by_chunk.items()})
            for k, part in enumerate(parts)
        ]
        return batch.with_fields(**{PIXELS: torch.cat(moved)})

    def start(self, part: Batch) -> Tensors:
        """The outputs (n, 1, …) of first views: both sides of the pair that is moved apart."""
        frozen, keys = batch_norm.frozen(self.method), keyed_layers.drawing(self.method, part.keys)
        with frozen, own_norms(self.method), keys, self.autocast():
            return self.method.embed(part)

    def gradient(self, z: Tensors, t: Tensors, batch: Batch) -> dict[str, Tensor]:
        """The gradient of the global loss with respect to the second of each pair (z, z); z: of the rank's batch."""
        first = {name: x.detach().to(torch.promote_types(x.dtype, torch.float32)) for name, x in z.items()}
        with torch.enable_grad():
            second = {name: x.clone().requires_grad_() for name, x in first.items()}
            loss = self.method.loss({name: _pair(x, second[name]) for name, x in first.items()}, t, batch)
            found = torch.autograd.grad(loss * self.scale, [*second.values()], allow_unused=True)
        return {name: g for name, g in zip(second, found, strict=True) if g is not None}

    def moved(self, part: Batch, z: Tensors | None, gradient: Tensors) -> Tensor:
        """The adversarial views (n, 1, 3, H, W) of first_views. z: their outputs with graph, None: they are embedded
        here; gradient: with respect to these."""
        (pixels,) = part.views
        with torch.enable_grad():
            z = z or self.start(part)
            scalar = torch.stack([(z[name] * g).sum() for name, g in gradient.items()]).sum()
            (by_pixel,) = torch.autograd.grad(scalar, pixels)
        return pixels.detach() + self.options.epsilon * by_pixel.nan_to_num().sign()


def first_views(part: Batch) -> Batch:
    """The batch with its first views alone, (n, 1, 3, H, W), which require grad."""
    return part.replaced(views=(part.views[0][:, :1].detach().requires_grad_(),))


def embed(method: Method, batch: Batch, clean: Embed) -> Tensors:
    """The outputs of the clean views and, where the batch has adversarial ones, of those apart. clean: the engine's
    embed."""
    z = clean(batch)
    if PIXELS not in batch.fields:
        return z
    with own_norms(method):
        further = clean(batch.replaced(views=(batch.fields[PIXELS],)))
    return {**z, **{PREFIX + name: x for name, x in further.items()}}


def loss(method: Method, z: Tensors, t: Tensors, batch: Batch, options: AdversarialOptions | None) -> Tensor:
    """The method's loss of the clean views and, with options, `weight` times that of the first view and its adversarial
    one."""
    if options is None:
        return method.loss(z, t, batch)
    clean, further = split(z)
    pairs = {name: _pair(x[:, :1], further[name]) for name, x in clean.items()}
    return method.loss(clean, t, batch) + options.weight * method.loss(pairs, t, batch)


def split(z: Tensors) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The clean outputs, and the adversarial ones under the clean ones' names."""
    further = {name.removeprefix(PREFIX): x for name, x in z.items() if name.startswith(PREFIX)}
    return {name: x for name, x in z.items() if not name.startswith(PREFIX)}, further


def _pair(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], 1)
