"""What a recipe may say about its encoder."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Mode = Literal["global", "local"]  # of BatchNorm's statistics
Stem = Literal["imagenet", "cifar"]


class EncoderOptions(BaseModel):
    """Recipe section `encoder`."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vit_small", "vit_base", "convnet"] = (
        "resnet50"
    )
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
