"""Options of encoders (recipe section `encoder`), projection heads and shuffled BatchNorm. Loads no torch."""

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic_core import PydanticKnownError

from kilobatch.data.errors import UserError
from kilobatch.methods.backbone_names import FORMS, RESERVED, is_foreign
from kilobatch.methods.options import OptionContext, WeightsReference
from kilobatch.methods.source_file import is_source, parse_source

Mode = Literal["global", "local"]  # of BatchNorm's statistics
Stem = Literal["imagenet", "cifar", "imagenet_same"]

OwnName = Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "vit_small", "vit_base", "convnet"]
OWN_NAMES: tuple[str, ...] = get_args(OwnName)
BOTTLENECKS = ("resnet50", "resnet101", "resnet152")
WIDEST = 4  # the largest published multiple of a ResNet's channels; above it, channels were meant


def _known_or_foreign(name: str) -> str:
    if is_source(name):
        parse_source(name)
    elif not (name in OWN_NAMES or is_foreign(name)):
        # In the words of a choice between literals, so that the nearest name is guessed as for one.
        expected = ", ".join(f"'{own}'" for own in OWN_NAMES)
        raise PydanticKnownError("literal_error", {"expected": f"{expected}, {FORMS}"})
    return name


# What editors and `kilobatch options` say of the name.
_NAMES = {"anyOf": [{"enum": list(OWN_NAMES)}, {"type": "string", "pattern": r"^(timm|torchvision)/.|\.py:"}]}


class EncoderOptions(BaseModel):
    """Recipe section `encoder`."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[
        str,
        AfterValidator(_known_or_foreign),
        WithJsonSchema(_NAMES),
        Field(
            description="the network; convnet is a small one for images of about 32 pixels; or timm/NAME, "
            "torchvision/NAME, or FILE.py:function that returns a network of your own"
        ),
    ] = "resnet50"
    options: Annotated[
        dict[str, Any] | None,
        Field(
            description="arguments of the network of timm, of torchvision or of your function, such as "
            "{drop_path_rate: 0.2}; null for the networks of kilobatch"
        ),
    ] = None
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
    checkpoint: Annotated[
        bool,
        Field(
            description="all but convnet: a block keeps its input alone and is computed again in the backward; less "
            "memory, about a third more time, same gradients"
        ),
    ] = False
    start: Annotated[
        WeightsReference | None,
        Field(
            description="starting weights: a run, a checkpoint, an exported file, or a checkpoint of another package, "
            "such as torchvision's, timm's or MoCo's; null: random ones"
        ),
    ] = None
    start_share: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="the least share of the encoder's parameters that `start` has to hold, and of that encoder's "
            "that has to be used; with less the run is refused",
        ),
    ] = 0.9
    start_prefix: Annotated[
        str | None,
        Field(
            description="what stands before the encoder's names in `start`, such as module.encoder_k.; null: found, by "
            "the names of the packages that are known"
        ),
    ] = None

    @property
    def times(self) -> int:
        """width, or the network's own where it is null."""
        return self.width or (16 if self.name == "convnet" else 1)

    @property
    def foreign(self) -> bool:
        """Whether the network is of a library or of a user's own file."""
        return is_foreign(self.name)

    @model_validator(mode="after")
    def fits_the_network(self) -> Self:
        if self.options is not None and not self.foreign:
            raise ValueError(f"options for {self.name}: its options are those beside its name; use options null")
        if reserved := [name for name in self.options or () if name in RESERVED]:
            raise ValueError(
                f"options has {reserved[0]}: the encoder has no classifier, loads no weights and sees three channels; "
                "leave it out"
            )
        if self.foreign and self.width is not None:
            raise ValueError(f"width {self.width} for {self.name}: it is a ResNet's or convnet's; leave it null")
        if self.name.startswith("resnet") and self.width is not None and self.width > WIDEST:
            raise ValueError(
                f"width {self.width} for {self.name}: of a ResNet it is a multiple of its channels, 1 to {WIDEST}; "
                "null is 1"
            )
        if self.name.startswith("vit") and self.width is not None:
            raise ValueError(f"width {self.width} for {self.name}: a ViT's is fixed; leave it null")
        if self.checkpoint and self.name == "convnet":
            raise ValueError(
                "checkpoint true for convnet: it has no blocks; use engine.chunks to save memory, or false"
            )
        if self.sk_ratio and self.name not in BOTTLENECKS:
            raise ValueError(
                f"sk_ratio {self.sk_ratio:g} for {self.name}: selective kernels stand in bottlenecks; "
                f"use {', '.join(BOTTLENECKS)}, or 0"
            )
        return self


class NeedsLayers:
    """Constraint of method.dim, the width of the last layer that fine-tuning keeps: method.layer is not 0."""

    def check(self, value: int | None, context: OptionContext) -> None:
        if value is not None and context.method.layer == 0:
            raise UserError(
                f"method.dim is {value}, the width of a head's last layer, but method.layer is 0, which keeps none; "
                "leave method.dim out"
            )


LastLayerDim = Annotated[Annotated[int, Field(gt=0)] | None, NeedsLayers()]


def refuse_layers(layer: int, dim: int | None, start: str, start_layers: int, start_dim: int | None) -> None:
    """Raises UserError if fine-tuning cannot start from `start`.

    Fine-tuning keeps `layer` layers of a head, the last with `dim` outputs (None: all are hidden layers). The head of
    `start` has `start_layers` layers, the last with `start_dim` outputs (None: all are hidden layers).
    """
    head = f"the head of method.start '{start}'"
    if layer > start_layers:
        use = f"method.layer={start_layers}" + (f" method.dim={start_dim}" if start_dim else "")
        raise UserError(
            f"method.layer is {layer}, but method.start '{start}' has {start_layers} layers of a projection head; "
            f"use {use}"
        )
    expected = start_dim if layer == start_layers else None
    if dim == expected:
        return
    if dim is None:
        raise UserError(
            f"method.layer {layer} is the last of {head}: it makes projections of {expected} dimensions, and has "
            f"neither bias nor ReLU; use method.dim={expected} to keep it, or method.layer={layer - 1}"
        )
    if expected:
        raise UserError(f"method.dim is {dim}, but {head} makes projections of {expected}; use method.dim={expected}")
    last = f", or use method.layer={start_layers} method.dim={start_dim}" if start_dim else ""
    raise UserError(
        f"method.dim is {dim}, the width of a head's last layer, but layer {layer} of {head} is a hidden one; leave "
        f"method.dim out{last}"
    )


SHUFFLE_NEEDS_WORKERS = (
    "method.shuffle is true, but one worker has nobody to shuffle with: its norms would still tell queries their keys; "
    "use more workers, or encoder.norm=global with method.shuffle=false and a large data.batch"
)
SHUFFLES_WHOLE_BATCH = "method.shuffle is true, and mixes the whole batch of all ranks"


class NeedsLocalNorm:
    """Constraint of method.shuffle: encoder.norm local, several workers, one chunk."""

    def check(self, value: bool, context: OptionContext) -> None:
        refuse_global_norm(value, context.encoder.norm)
        if value and context.workers == 1:
            raise UserError(SHUFFLE_NEEDS_WORKERS)
        if value and context.chunks > 1:
            raise UserError(f"{SHUFFLES_WHOLE_BATCH}, but engine.chunks is {context.chunks}; use engine.chunks=1")


def refuse_global_norm(shuffle: bool, norm: Mode) -> None:
    """Raises UserError if norms are global: a shuffled order changes nothing for them."""
    if shuffle and norm == "global":
        raise UserError(
            "method.shuffle is true, but encoder.norm is 'global': its statistics are the same in any order; "
            "use encoder.norm=local or method.shuffle=false"
        )


ShuffleOption = Annotated[bool, NeedsLocalNorm()]
