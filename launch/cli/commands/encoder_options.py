"""Arguments and options of the commands of encoders.py."""

from pathlib import Path
from typing import Annotated, Literal

import typer

# eval
EvaluateOverrides = Annotated[
    list[str] | None,
    typer.Argument(help="Changes to the section evaluate, such as evaluate.knn.k=20", metavar="evaluate.b=value"),
]
Knn = Annotated[bool, typer.Option("--knn", help="Weighted k-nearest-neighbour classification.")]
Linear = Annotated[
    bool,
    typer.Option("--linear", help="Linear probe, trained by the recipe's protocol, or with evaluate.linear.lr=search."),
]
FastLinear = Annotated[
    bool, typer.Option("--fast-linear", help="Linear probe, trained on features that are computed once.")
]
Moved = Annotated[
    bool,
    typer.Option(
        "--moved",
        help="k-NN on test images that are turned, shifted and scaled: of the encoder, before and after training, and "
        "of raw pixels.",
    ),
]
Picture = Annotated[
    bool,
    typer.Option(
        "--picture", help="A picture of test images with their nearest neighbours: pictures/neighbours.png in the run."
    ),
]
Classify = Annotated[
    bool, typer.Option("--classify", help="The run's own classifier, on test images as they are and on moved ones.")
]
TrainImages = Annotated[
    str | None,
    typer.Option(
        "--train",
        help="Training images instead of the run's, for k-NN and probes: a .beton file or a source.",
        show_default=False,
    ),
]
TestImages = Annotated[
    str | None,
    typer.Option("--test", help="Test images instead of the run's: a .beton file or a source.", show_default=False),
]

# embed
EncoderFrom = Annotated[
    str,
    typer.Argument(
        help="A run (its newest checkpoint is taken), a checkpoint, or an exported .safetensors file.",
        metavar="RUN|EXPORT",
        show_default=False,
    ),
]
EmbeddedSource = Annotated[
    str,
    typer.Argument(help="The images: a folder, a .beton file, list:FILE, tar:PATTERN, …", show_default=False),
]
FeatureFile = Annotated[
    Path, typer.Argument(help="The .npz, .safetensors or .parquet file to write.", show_default=False)
]
EmbedWorkers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        min=1,
        help="Number of worker processes on this machine; the features do not depend on it. Default: one for each GPU, "
        "or 1 without a GPU.",
        show_default=False,
    ),
]

# convert
Source = Annotated[str | None, typer.Argument(help="The images to read: a folder, list:FILE, tar:PATTERN, …")]
BetonFile = Annotated[Path | None, typer.Argument(help="The .beton file to write.")]
MaxSide = Annotated[
    int | None, typer.Option(help="Shrink images whose longer side has more pixels than this.", show_default=False)
]
MinSide = Annotated[
    int | None,
    typer.Option(help="With --max-side: but leave the shorter side this many pixels.", show_default=False),
]
ValueRange = Annotated[
    str | None,
    typer.Option(
        "--range",
        help="In images of more than 8 bits, the values that become black and white. Default: measured over all.",
        metavar="LOW,HIGH",
        show_default=False,
    ),
]
Quality = Annotated[int, typer.Option(help="Quality of the JPEGs that are written, from 1 to 100.")]
Split = Annotated[
    Literal["train", "test"], typer.Option(help="The part to read, of sources that have two.", case_sensitive=False)
]
HoldOut = Annotated[
    str | None,
    typer.Option(
        "--hold-out",
        help="Write this share of the images, such as 5%, to a second file, OUT_held_out.beton, and the others to OUT: "
        "each image by a hash of its own, so that it stays where it is when others are added.",
        metavar="SHARE",
        show_default=False,
    ),
]
HoldOutSeed = Annotated[
    int, typer.Option("--hold-out-seed", min=0, help="With --hold-out: another number holds out other images.")
]
SkipBroken = Annotated[
    bool, typer.Option("--skip-broken", help="Leave out images that cannot be read, instead of stopping.")
]
VerifiedFile = Annotated[
    Path | None,
    typer.Option("--verify", help="Write nothing; check every byte of this .beton file.", show_default=False),
]
AdoptedFile = Annotated[
    Path | None,
    typer.Option(
        "--adopt",
        help="Check every image of this .beton file, which FFCV or an older kilobatch wrote, and write the note "
        "beside it that training needs. The file stays as it is.",
        show_default=False,
    ),
]
ClassNames = Annotated[
    Path | None,
    typer.Option(
        "--class-names", help="With --adopt: a text file, the name of a class in each line.", show_default=False
    ),
]
LabelField = Annotated[
    str | None,
    typer.Option("--label-field", help="With --adopt: the field with the labels, of several.", show_default=False),
]

# export, weights, import
WeightsFile = Annotated[
    Path, typer.Argument(help="A file of torch.save or safetensors; no code in it is run.", show_default=False)
]
Whole = Annotated[
    bool, typer.Option("--whole", help="Write the whole method, for other runs to start from or to use as a teacher.")
]
Checkpoint = Annotated[
    Path,
    typer.Argument(help="A TensorFlow checkpoint: its name, one of its files, or its folder.", show_default=False),
]
Projections = Annotated[
    bool, typer.Option("--projections", help="Take the projection head, even if there is a classifier as well.")
]
ClassifierAfter = Annotated[
    int | None,
    typer.Option(
        help="Take the classifier, with this many layers of the projection head in front of it.", show_default=False
    ),
]
