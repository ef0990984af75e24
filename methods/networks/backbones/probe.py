"""Finds out by small forwards what a network makes of images, and whether it draws or mixes samples."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kilobatch.data.errors import UserError
from kilobatch.methods.networks import batch_norm, keyed_layers
from kilobatch.methods.networks.batch_norm import BatchNorm

IMAGES = 4  # of a forward that looks for mixed samples
# Up to so many parameters a network is run with numbers; that takes less time than without them, up to such sizes.
LARGEST_RUN = 5e7
CHEAP = 1.25e9  # operations of an image, with which the search for mixed samples takes about half a second
SAME = 1e-3  # relative difference that another size of a batch makes by rounding, at most


@dataclass(frozen=True)
class Facts:
    """features: of an image; operations: of a forward of one image of the smallest size."""

    features: int
    operations: float


def is_fake() -> bool:
    """Whether tensors that are made now have shapes alone, as in a plan."""
    return isinstance(torch.empty(0), FakeTensor)


def find_facts(network: nn.Module, name: str, sizes: Sequence[int], way_out: str) -> Facts:
    """Runs the network on two images of each of these sizes; a large one without numbers, which takes no memory.
    way_out: of sizes that it does not take, for messages.

    Raises UserError for a size that it does not take, for an output that is neither (N, D) nor (N, D, h, w), and for
    what draws from torch's generator.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports triton, which no other worker on a CPU needs

    modes = [(module, module.training) for module in network.modules()]
    counter = FlopCounterMode(display=False)
    features: set[int] = set()
    as_it_is = is_fake() or sum(p.numel() for p in network.parameters()) <= LARGEST_RUN
    try:
        with torch.no_grad(), nullcontext() if as_it_is else FakeTensorMode(allow_non_fake_inputs=True):
            for size in sorted(sizes):
                images = torch.zeros(2, 3, size, size, dtype=next(network.parameters()).dtype)
                with counter if size == min(sizes) else nullcontext():
                    shape = _shape(network.eval(), images, name, way_out)
                network.train()
                for norm in batch_norm.norms(network):
                    norm.eval()
                with keyed_layers.off(network), _named(network, drawn := _Draws(name)), drawn:
                    shape = _shape(network, images, name, way_out)
                features.add(shape[1])
    finally:
        for module, training in modes:
            module.training = training
    if len(features) > 1:
        raise UserError(f"encoder {name} has {sorted(features)} features for images of {sorted(sizes)} pixels")
    return Facts(features.pop(), counter.get_total_flops() / 2)


def _shape(network: nn.Module, images: Tensor, name: str, way_out: str) -> torch.Size:
    try:
        found: Any = network(images)
    except UserError:
        raise
    except Exception as error:
        size = images.shape[2]
        raise UserError(
            f"encoder {name} does not take images of {size} x {size} pixels ({type(error).__name__}: {error}); "
            f"{way_out}"
        ) from error
    if not isinstance(found, Tensor) or found.ndim not in (2, 4) or len(found) != len(images):
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(
            f"encoder {name} makes {shape} of {len(images)} images {'in training' if network.training else ''}; it "
            "should make features (N, D), or a map (N, D, h, w), whose mean is taken"
        )
    return found.shape


class _Draws(TorchDispatchMode):
    """Refuses operations that draw from torch's generator. Their layer is where the network is at that moment."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.layers = name, list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs or {}):
            layer = next((name for name in reversed(self.layers) if name), "")
            where = f"layer {layer} of encoder {self.name}" if layer else f"encoder {self.name}"
            raise UserError(
                f"{where} draws from torch's generator in its forward ({func}), so that results would depend on the "
                "number of ranks and chunks; set its rate to 0 by encoder.options, or use nn.Dropout or a layer of "
                "kilobatch.methods.networks.keyed_layers"
            )
        return func(*args, **(kwargs or {}))


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation that can draw does: attention draws for its dropout alone."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value))
    return True


@contextmanager
def _named(network: nn.Module, draws: _Draws) -> Iterator[None]:
    """Tells `draws` which layer is computed."""

    def enter(name: str, *_: Any) -> None:
        draws.layers.append(name)

    def leave(*_: Any) -> None:
        draws.layers.pop()

    hooks: list[Any] = []
    for name, module in network.named_modules():
        hooks += [module.register_forward_pre_hook(partial(enter, name)), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def is_cheap(network: nn.Module, facts: Facts) -> bool:
    """Whether refuse_mixed may run at every start."""
    return facts.operations <= CHEAP and sum(p.numel() for p in network.parameters()) <= LARGEST_RUN


@torch.no_grad()
def refuse_mixed(network: nn.Module, name: str, size: int) -> None:
    """Raises UserError where features of a sample differ from one forward to the next, depend on other samples, or
    where a forward changes a buffer: each rank would have its own. Norms of ours are left out: their modes say what
    they depend on.

    The network is run on a few images of `size` pixels, on a CPU in fp32, with other weights: new ones are often zero
    where layers begin as the identity, and would hide what the layer does.
    """
    probed = copy.deepcopy(network).float().train()
    generator = torch.Generator().manual_seed(0)
    for p in probed.parameters():
        if p.numel() == max(p.shape):  # a vector, of any number of dimensions
            p.uniform_(0.5, 1.5, generator=generator)
        elif p.abs().max() < 1e-3:
            p.normal_(0, 0.02, generator=generator)
    for norm in batch_norm.norms(probed):
        norm.stand_in = (_PerSample(1),)
    before = {key: buffer.clone() for key, buffer in probed.named_buffers()}
    images = torch.randn(2 * IMAGES, 3, size, size, generator=generator)
    first, other = images.split(IMAGES)
    keys = torch.arange(IMAGES)

    def features(x: Tensor) -> Tensor:
        with keyed_layers.drawing(probed, keys[: len(x)]):
            return probed(x).flatten(1)

    whole = features(first)
    _refuse_difference(
        name, "its features of the same images differ from one forward to the next", whole, features(first)
    )
    beside = features(torch.cat([first[:1], other[1:]]))
    depends = "its features of an image depend on the other images of its chunk"
    _refuse_difference(name, depends, whole[:1], beside[:1])
    _refuse_difference(name, depends, whole[: IMAGES // 2], features(first[: IMAGES // 2]))
    changed = [key for key, buffer in probed.named_buffers() if not torch.equal(buffer, before[key])]
    if changed:
        raise UserError(
            f"encoder {name} changes its buffer {changed[0]} in a forward, so that each rank would have its own; use a "
            "layer that keeps no state, or BatchNorm"
        )


def _refuse_difference(name: str, what: str, a: Tensor, b: Tensor) -> None:
    if not (a - b).norm() <= SAME * a.norm():  # also where one is no number
        raise UserError(
            f"encoder {name} cannot be used, because {what}, so that results would depend on the number of ranks and "
            "chunks; use layers that see one sample at a time, BatchNorm, or nn.Dropout"
        )


class _PerSample(BatchNorm):
    """A norm of each sample by itself, which keeps numbers in bounds."""

    def normalised(self, x: Tensor, counts: bool) -> Tensor:
        dims = tuple(range(1, x.ndim))
        return (x - x.mean(dims, keepdim=True)) / (x.std(dims, keepdim=True) + 1e-3)
