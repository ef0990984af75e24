"""What a recipe may say about its encoder."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Mode = Literal["global", "local"]  # of BatchNorm's statistics
Stem = Literal["imagenet", "cifar", "imagenet_same"]

BOTTLENECKS = ("resnet50", "resnet101", "resnet152")
WIDEST = 4  # of the ResNets that anybody has published; above it, somebody meant channels


class EncoderOptions(BaseModel):
    """Recipe section `encoder`."""

    model_config = ConfigDict(extra="forbid")

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vit_small", "vit_base", "convnet"] = (
        "resnet50"
    )
    stem: Annotated[
        Stem,
        Field(
            description="ResNets: cifar is 3x3 without max-pool, for images of about 32 pixels; imagenet_same pads the "
            "max-pool below and right, as TensorFlow does, for weights from there"
        ),
    ] = "imagenet"
    norm: Annotated[
        Mode, Field(description="BatchNorm's statistics: over the global batch, or over each rank's chunk")
    ] = "global"
    zero_init: Annotated[bool, Field(description="ResNets: the last gamma of each block starts at zero")] = True
    width: Annotated[
        int | None,
        Field(
            gt=0,
            description="convnet: channels of the first convolution, 16 where null; features are 8 times it. ResNets: "
            f"times the channels, 1 to {WIDEST}, 1 where null",
        ),
    ] = None
    sk_ratio: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="ResNets from 50 on: selective kernels, with stem and shortcuts of ResNet-D; channels of their "
            "squeeze per channel, 0.0625 in the papers; 0: none",
        ),
    ] = 0.0

    @property
    def times(self) -> int:
        """width, also where it is left to the network."""
        return self.width or (16 if self.name == "convnet" else 1)

    @model_validator(mode="after")
    def fits_the_network(self) -> Self:
        if self.name.startswith("resnet") and self.width is not None and self.width > WIDEST:
            raise ValueError(
                f"width {self.width} for {self.name}: of a ResNet it is a multiple of its channels, 1 to {WIDEST}; "
                "null is 1"
            )
        if self.name.startswith("vit") and self.width is not None:
            raise ValueError(f"width {self.width} for {self.name}: a ViT's is fixed; leave it null")
        if self.sk_ratio and self.name not in BOTTLENECKS:
            raise ValueError(
                f"sk_ratio {self.sk_ratio:g} for {self.name}: selective kernels stand in bottlenecks; "
                f"use {', '.join(BOTTLENECKS)}, or 0"
            )
        return self
