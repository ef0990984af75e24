"""An encoder around a network of timm, of torchvision, or of a user's own function."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from kilobatch.data.errors import UserError
from kilobatch.methods.backbone_names import check_name, library_of
from kilobatch.methods.networks.backbones import blocks, libraries, probe
from kilobatch.methods.networks.backbones.adapt import use_our_layers
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.source_file import load_source


class Backbone(Encoder):
    """Images (N, 3, H, W) -> features (N, features) of `network`, which makes them or a map (N, features, h, w), whose
    mean is taken.

    The network's BatchNorms, dropouts and drop paths are replaced by ours, under the same names. sizes: pixels of the
    images that are to come; (): those that the network was made for. checked: whether to look for samples that are
    mixed, whatever it costs.

    Raises UserError for a name, an option or a size that there is not, and for layers that depend on the number of
    ranks or chunks.
    """

    def __init__(self, options: EncoderOptions, sizes: Sequence[int] = (), checked: bool = False) -> None:
        super().__init__()
        name, given = options.name, options.options or {}
        self.norm, self.library = options.norm, library_of(name)
        network = libraries.build(name, given) if self.library else _own(name, given)
        use_our_layers(network, options.norm)
        self.network = network
        sizes = sizes or (libraries.default_size(network, given),)
        way_out = "set data.views.size" + _size_options(network)
        facts = probe.find_facts(network, name, sizes, way_out)
        self.features = facts.features
        if not probe.is_fake() and (checked or probe.is_cheap(network, facts)):
            with torch.random.fork_rng(devices=[]):
                probe.refuse_mixed(network, name, min(sizes))
        if options.checkpoint:
            self._recompute(name)

    def _recompute(self, name: str) -> None:
        found = blocks.find_blocks(self.network)
        if not found:
            raise UserError(f"encoder.checkpoint is true, but {name} has no blocks; use engine.chunks, or false")
        for _, block in found:
            blocks.recompute(block)

    def by_depth(self) -> list[tuple[str, ...]]:
        parts = blocks.depth_order(self.network)
        return [tuple(f"network.{name}" for name in part) for part in parts] if parts else super().by_depth()

    def forward(self, images: Tensor) -> Tensor:
        found = self.network(self._laid_out(images))
        return found.mean((2, 3)) if found.ndim == 4 else found

    def stages(self, images: Tensor) -> list[Tensor]:
        own = getattr(self.network, "stages", None)  # of a user's own network, a method; of ConvNeXt, a layer
        if not self.library and inspect.ismethod(own):
            return own(images)
        return libraries.stages(self.network, self._laid_out(images))

    def _laid_out(self, images: Tensor) -> Tensor:
        # Faster for convolutions. The libraries' networks take it; others may look at their input's memory.
        return images.contiguous(memory_format=torch.channels_last) if self.library else images


def _own(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The network that a user's function returns."""
    check_name(name)
    function = load_source(name)
    if probe.is_fake():
        with _disable_current_modes():
            network = _called(name, function, options)
        return libraries.without_data(network) if isinstance(network, nn.Module) else network
    return _called(name, function, options)


def _called(name: str, function: Any, options: Mapping[str, Any]) -> nn.Module:
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        known = ", ".join(inspect.signature(function).parameters) or "none"
        raise UserError(
            f"encoder.options {dict(options)} do not fit {name}: {error}; its arguments: {known}"
        ) from error
    network = function(**options)
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} returns a {type(network).__name__}; it should return an nn.Module")
    if not any(True for _ in network.parameters()):
        raise UserError(f"{name} returns a network without parameters; there is nothing to train")
    return network


def _size_options(network: nn.Module) -> str:
    taken = [name for name in libraries.OWN_TO_SIZE if name in inspect.signature(type(network)).parameters]
    return f", or encoder.options.{taken[0]}, to a size that it takes" if taken else " to a size that it takes"
