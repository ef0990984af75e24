"""Builds the encoder that a recipe names."""

from collections.abc import Sequence

from kilobatch.methods.networks.backbones.backbone import Backbone
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.keyed_layers import use_keyed_layers
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.networks.resnet import ResNet
from kilobatch.methods.networks.vit import SIZES, ViT


def build_encoder(options: EncoderOptions, sizes: Sequence[int] = ()) -> Encoder:
    """A freshly initialised encoder on the CPU; torch's random state decides its weights. Layers that draw in training
    draw by the keys of samples. sizes: pixels of the images that are to come, by which a network that is not of this
    project is tried.

    Raises UserError for such a network that cannot be used.
    """
    if options.foreign:
        return Backbone(options, sizes)
    encoder = _network(options)
    use_keyed_layers(encoder)
    encoder.recomputes = options.checkpoint
    return encoder


def _network(options: EncoderOptions) -> Encoder:
    if options.name == "convnet":
        return ConvNet(options.times, options.norm)
    if options.name in SIZES:
        return ViT(*SIZES[options.name], options.norm)
    return ResNet(options.name, options.stem, options.norm, options.zero_init, options.times, options.sk_ratio)
