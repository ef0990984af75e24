"""Runs the evaluators that a recipe names, on one method and data set."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from kilobatch.data.views.options import Views
from kilobatch.methods import collectives
from kilobatch.methods.method import Method
from kilobatch.trainer.evaluate import classify, fast_linear, knn, linear, moved, picture
from kilobatch.trainer.evaluate.baselines import measurement
from kilobatch.trainer.evaluate.baselines.baselines_file import Baselines
from kilobatch.trainer.evaluate.features import Images, Represent, classifying, representing
from kilobatch.trainer.evaluate.image_sample import ImageSample, collect
from kilobatch.trainer.evaluate.linear import Epochs
from kilobatch.trainer.evaluate.options import EvaluateOptions, Evaluator


@dataclass(frozen=True)
class EvaluationSuite:
    """The method and the images that evaluators work on.

    untrained: gives the method as its seed initialised it; train, test: clean images; probe: gives the augmented
    training images of the linear protocol; sample: gives those of the training and the test images that baselines are
    measured on; classes: the names of the training's classes, whose numbers all labels are; among: the numbers of the
    test images' classes, where these are some of them; None: all; folder: the run's; labels: of how many training
    images the training learned the labels, None: of all, or of none; baselines: what the encoder is compared with,
    None: they are not known.
    """

    method: Method
    untrained: Callable[[], Method]
    train: Images
    test: Images
    probe: Callable[[], AbstractContextManager[Epochs]]
    sample: Callable[[], tuple[Images, Images]]
    views: Views
    classes: Sequence[str]
    among: Sequence[int] | None
    options: EvaluateOptions
    folder: Path
    labels: int | None = None
    baselines: Baselines | None = None

    def evaluate(self, name: Evaluator) -> Iterator[tuple[str, float]]:
        """Yields (name, value). All ranks call it together; a picture yields nothing, and rank 0 draws it."""
        mean, std = self.views.mean, self.views.std
        with representing(self.method) as represent:
            match name:
                case "knn":
                    yield from knn.evaluate(represent, self.train, self.test, self.options.knn, self.among)
                    if self.baselines and self.baselines.sampled:
                        yield "knn_sample/top1", self.sample_accuracies({"trained": represent})["trained"]
                case "linear":
                    with self.probe() as probe:
                        yield from linear.evaluate(
                            represent, probe, self.test, len(self.classes), self.options.linear, self.among
                        )
                case "fast_linear":
                    yield from fast_linear.evaluate(
                        represent, self.train, self.test, len(self.classes), self.options.fast_linear, self.among
                    )
                case "moved":
                    with representing(self.untrained()) as untrained:
                        yield from moved.evaluate(represent, untrained, self.train, self.test, mean, std, self.among)
                case "classify":
                    with classifying(self.method) as logits:
                        yield from classify.evaluate(logits, self.test, name, self.among)
                case "classify_moved":
                    with classifying(self.method) as logits:
                        yield from classify.evaluate(logits, moved.Moved(self.test, mean, std), name, self.among)
                case "picture":
                    bank, queries = self.picture_samples()
                    if collectives.rank() == 0:
                        self.draw(bank, queries)

    def measure_baselines(self) -> dict[str, float]:
        """The k-NN accuracies of `pixels` and of the `untrained` encoder; all ranks call it together. Raises
        BaselinesFailed on all of them."""
        pixels = measurement.raw_pixels(self.views.mean, self.views.std)
        with representing(self.untrained()) as untrained:
            return self.sample_accuracies({"pixels": pixels, "untrained": untrained})

    def sample_accuracies(self, of: Mapping[str, Represent]) -> dict[str, float]:
        """The k-NN accuracy of each representation on the images of the baselines."""
        return measurement.accuracies(of, *self.sample(), self.options.knn, self.among)

    def picture_samples(self) -> tuple[ImageSample, ImageSample]:
        """The training images and the test images of the picture, the same on every rank."""
        bank = self.image_sample(self.train, picture.BANK_IMAGES)
        return bank, self.image_sample(self._picture_queries(), picture.QUERY_IMAGES)

    @property
    def picture_file(self) -> Path:
        """The file that draw() writes."""
        return self.folder / "pictures" / "neighbours.png"

    def draw(self, bank: ImageSample, queries: ImageSample) -> Path:
        """Draws the picture of these images; to be called on rank 0. Returns its path."""
        title = f"{self.folder.name}: what the encoder sees"
        picture.draw(bank, queries, self.classes, title, self.picture_file, self.among)
        return self.picture_file

    def image_sample(self, images: Images, most: int) -> ImageSample:
        """Some of the images with their features, the same on every rank."""
        with representing(self.method) as represent:
            return collect(represent, images, self.views.mean, self.views.std, most)

    def _picture_queries(self) -> Images:
        """The test images for pictures: moved ones where the recipe's final evaluators include moved or classify_moved,
        else clean ones."""
        use_moved = not {"moved", "classify_moved"}.isdisjoint(self.options.final)
        return moved.Moved(self.test, self.views.mean, self.views.std) if use_moved else self.test
