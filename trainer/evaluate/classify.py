"""The method's own classifier on clean test images: no neighbours, no probe."""

from collections.abc import Iterator

from kilobatch.trainer.evaluate.features import Images, Represent, extract
from kilobatch.trainer.evaluate.linear import top


def evaluate(logits: Represent, test: Images, name: str) -> Iterator[tuple[str, float]]:
    """logits: images -> (N, classes). Yields NAME/top1 and NAME/top5 (0..1) over all ranks' test images."""
    found = extract(logits, test)
    for k, share in top(found.x, found.label).items():
        yield f"{name}/top{k}", share
