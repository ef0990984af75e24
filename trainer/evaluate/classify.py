"""Accuracy of the method's own classifier on test images."""

from collections.abc import Iterator, Sequence

from kilobatch.trainer.evaluate.features import Images, Represent, extract
from kilobatch.trainer.evaluate.linear import top_accuracies


def evaluate(
    logits: Represent, test: Images, name: str, among: Sequence[int] | None = None
) -> Iterator[tuple[str, float]]:
    """logits: of a batch, (N, classes). Yields NAME/top1 and NAME/top5 (0..1) over all ranks' test images.

    among: the classes that may be predicted; None: all.
    """
    features = extract(logits, test)
    for k, share in top_accuracies(features.x, features.label, among).items():
        yield f"{name}/top{k}", share
