"""The recipe's section `encoder`, and the encoder that it asks for."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from methods.convnet import ConvNet
from methods.encoder import Encoder
from methods.norm import Mode
from methods.resnet import ResNet, Stem


class EncoderOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "convnet"] = "resnet50"
    stem: Annotated[
        Stem, Field(description="ResNets: cifar is 3x3 without max-pool, for images of about 32 pixels")
    ] = "imagenet"
    norm: Annotated[
        Mode, Field(description="BatchNorm's statistics: over the global batch, or over each rank's chunk")
    ] = "global"
    zero_init: Annotated[bool, Field(description="ResNets: the last gamma of each block starts at zero")] = True
    width: Annotated[
        int, Field(gt=0, description="convnet: channels of the first convolution; features are 8 times it")
    ] = 16


def build(options: EncoderOptions) -> Encoder:
    """A freshly initialised encoder on the CPU; torch's random state decides its weights."""
    if options.name == "convnet":
        return ConvNet(options.width, options.norm)
    return ResNet(options.name, options.stem, options.norm, options.zero_init)
