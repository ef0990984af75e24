"""Commands for images and encoders: evaluate, embed, convert, export, weights, import.

What a command needs is imported when it is called, so that `kilobatch --help` and a wrong option are answered at once.
"""

from typing import Any

import typer

from kilobatch.launch.cli.commands import encoder_options
from kilobatch.launch.cli.commands.options import DataRoot, Force, Run, SafetensorsFile, Workers


def evaluate(
    run: Run,
    overrides: encoder_options.EvaluateOverrides = None,
    knn: encoder_options.Knn = False,
    linear: encoder_options.Linear = False,
    fast_linear: encoder_options.FastLinear = False,
    classify: encoder_options.Classify = False,
    moved: encoder_options.Moved = False,
    picture: encoder_options.Picture = False,
    train: encoder_options.TrainImages = None,
    test: encoder_options.TestImages = None,
    data_root: DataRoot = None,
    workers: Workers = None,
) -> None:
    """Evaluates the encoder of a run, as it is in the newest checkpoint.

    Without an evaluator it runs those of the recipe's evaluate.final; where some of these failed at the training's end,
    it asks them alone, again.
    """
    from kilobatch.launch.cli.train import evaluate

    wanted = {"knn": knn, "linear": linear, "fast_linear": fast_linear, "moved": moved, "picture": picture}
    wanted |= {"classify": classify, "classify_moved": classify}
    images = {"train": train, "test": test}
    evaluators = [name for name in wanted if wanted[name]]
    raise typer.Exit(evaluate(run, evaluators, overrides or [], images, workers, data_root or []))


def embed(
    encoder: encoder_options.EncoderFrom,
    source: encoder_options.EmbeddedSource,
    out: encoder_options.FeatureFile,
    split: encoder_options.Split = "train",
    workers: encoder_options.EmbedWorkers = None,
    force: Force = False,
) -> None:
    """Writes the features of images, with their names and labels, in the source's order.

    Killed, the same command goes on from the parts that are finished.
    """
    from kilobatch.launch.cli.embed import embed

    raise typer.Exit(embed(encoder, source, out, split=split, workers=workers, force=force))


def convert(
    source: encoder_options.Source = None,
    out: encoder_options.BetonFile = None,
    max_side: encoder_options.MaxSide = None,
    min_side: encoder_options.MinSide = None,
    quality: encoder_options.Quality = 90,
    value_range: encoder_options.ValueRange = None,
    split: encoder_options.Split = "train",
    skip_broken: encoder_options.SkipBroken = False,
    hold_out: encoder_options.HoldOut = None,
    hold_out_seed: encoder_options.HoldOutSeed = 0,
    verify: encoder_options.VerifiedFile = None,
    adopt: encoder_options.AdoptedFile = None,
    class_names: encoder_options.ClassNames = None,
    label_field: encoder_options.LabelField = None,
) -> None:
    """Writes images to a .beton file for training, checks such a file, or adopts one that FFCV wrote."""
    from kilobatch.launch.cli.convert import convert_or_check

    encoding: dict[str, Any] = {"max_side": max_side, "min_side": min_side, "quality": quality}
    encoding |= {"value_range": value_range, "split": split, "skip_broken": skip_broken}
    encoding |= {"hold_out": hold_out, "hold_out_seed": hold_out_seed}
    convert_or_check(source, out, verify, adopt, class_names=class_names, label_field=label_field, **encoding)


def export(run: Run, out: SafetensorsFile, whole: encoder_options.Whole = False, force: Force = False) -> None:
    """Writes a run's encoder to a .safetensors file, with torchvision's parameter names."""
    from kilobatch.launch.cli.convert import export

    export(run, out, force=force, whole=whole)


def weights(file: encoder_options.WeightsFile) -> None:
    """Lists the encoders in a file of weights of this or another package, and how to start with one."""
    from kilobatch.launch.cli.reports.weights import print_weights

    print_weights(file)


def import_checkpoint(
    checkpoint: encoder_options.Checkpoint,
    out: SafetensorsFile,
    projections: encoder_options.Projections = False,
    classifier_after: encoder_options.ClassifierAfter = None,
    force: Force = False,
) -> None:
    """Converts a checkpoint of SimCLR's authors to a .safetensors file, for runs to start from."""
    from kilobatch.launch.cli.convert import import_tensorflow

    import_tensorflow(checkpoint, out, projections=projections, classifier_after=classifier_after, force=force)
