"""Accuracy of the method's own classifier on test images."""

from collections.abc import Iterator

from kilobatch.trainer.evaluate.features import Images, Represent, extract
from kilobatch.trainer.evaluate.linear import top_accuracies


def evaluate(logits: Represent, test: Images, name: str) -> Iterator[tuple[str, float]]:
    """logits: images -> (N, classes). Yields NAME/top1 and NAME/top5 (0..1) over all ranks' test images."""
    features = extract(logits, test)
    for k, share in top_accuracies(features.x, features.label).items():
        yield f"{name}/top{k}", share
