"""A training that does not learn is told so: once while it trains, at its end, and to those who ask."""

import io
from pathlib import Path

from rich.console import Console

from kilobatch.trainer.monitor.learning import LearningFacts
from kilobatch.trainer.monitor.monitor import Monitor
from kilobatch.trainer.monitor.progress_file import Progress

STEPS = 40
FACTS = LearningFacts(knn="k 5")
FAR = "warning (from step 6 on): the loss is about {}, far above 2 at its start: the training diverges; use a lower "
FAR += "optimizer.lr"
POOR = "warning (from step {} on): k-NN of the encoder is 40.0%, not above the 50.0% of the untrained encoder (k 5)"
EVEN = {"embedding/std": 1.0, "embedding/effective_rank": 9.0}
SPREAD, ONE_POINT = EVEN, {"embedding/std": 0.01, "embedding/effective_rank": 9.0}
COLLAPSED = "warning (from step 6 on): the embedding has collapsed: its spread is 0.010 of an even one (all images in "
COLLAPSED += "one point)"


class Training:
    """Logs losses and accuracies; what is printed, and what is noted."""

    def __init__(self, folder: Path, start: int = 0, facts: LearningFacts = FACTS) -> None:
        self.folder, self.step = folder, start
        self.text = io.StringIO()
        self.monitor = Monitor(folder, STEPS, start, 4, Console(file=self.text, width=200), facts)

    def loss(self, *losses: float, embedding: dict[str, float] = SPREAD) -> None:
        for loss in losses:
            self.step += 1
            self.monitor.log(self.step, {"train/loss": loss, **embedding})

    def knn(self, trained: float, prefix: str = "") -> None:
        self.monitor.log(self.step, {f"{prefix}knn/top1": trained, "knn/untrained": 0.5, "knn/pixels": 0.6})

    def printed(self) -> list[str]:
        found = self.text.getvalue().splitlines()
        self.text.truncate(0)
        self.text.seek(0)
        return found

    def noted(self) -> list[str]:
        progress = Progress.of(self.folder)
        assert progress is not None
        return [note.kind for note in progress.notes]


def test_a_loss_far_above_its_start(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.loss(2.0, 2.5, 2.9, 2.9, 2.9)
    assert training.printed() == []  # a rise, but not a large one
    training.loss(5.0, 9.0, 9.0, 9.0)
    assert training.printed() == [FAR.format("3.24")]
    training.monitor.conclude()
    assert training.printed() == ["this training does not seem to have learned:", f"  {FAR.format('6.98')}"]
    assert training.noted() == ["loss"]
    training.loss(1.0, 1.0, 1.0, 1.0, 1.0)
    assert training.noted() == []
    training.monitor.conclude()
    assert training.printed() == []


def test_a_resumed_run_compares_with_its_first_loss_and_says_nothing_twice(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.loss(2.0, 9.0, 9.0, 9.0, 9.0, 9.0)
    assert len(training.printed()) == 1
    training.monitor.close()
    training = Training(tmp_path, 6)
    training.loss(9.0, 9.0, 9.0, 9.0, 9.0)
    assert training.printed() == [] and training.noted() == ["loss"]
    training.monitor.close()
    assert Training(tmp_path, 3).noted() == []  # from a checkpoint before that


def test_an_encoder_that_is_no_better_than_an_untrained_one(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.loss(2.0, 2.0, 2.0)
    training.knn(0.4)
    assert training.printed() == []  # too early to say
    training.loss(2.0)
    training.knn(0.4)
    training.loss(2.0)
    training.knn(0.4)
    assert training.printed() == [POOR.format(4)]
    training.knn(0.6)
    assert training.noted() == []
    training.knn(0.4, "final/")
    training.monitor.conclude()
    assert training.printed() == ["this training does not seem to have learned:", f"  {POOR.format(5)}"]


def test_a_collapse(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.loss(2.0, 2.0, 2.0, 2.0, 2.0)
    training.loss(2.0, 2.0, embedding=ONE_POINT)
    assert training.printed() == [COLLAPSED] and training.noted() == ["collapse"]


def test_few_directions_of_an_embedding_that_had_many(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.loss(2.0, embedding=SPREAD | {"embedding/effective_rank": 80.0})
    training.loss(2.0, 2.0, embedding=SPREAD | {"embedding/effective_rank": 3.0})  # too early to say
    training.loss(2.0, 2.0, 2.0, embedding=SPREAD | {"embedding/effective_rank": 6.0})
    assert training.printed() == [] and training.noted() == []
    training.loss(2.0, embedding=SPREAD | {"embedding/effective_rank": 3.5})
    fall = "its effective rank is 3.5, at its start it was 80 (all images along a few directions)"
    assert training.printed() == [f"warning (from step 7 on): the embedding has nearly collapsed: {fall}"]
    training.loss(2.0, embedding=SPREAD | {"embedding/effective_rank": 6.0})
    assert training.noted() == []


def test_few_directions_of_an_embedding_that_never_had_many(tmp_path: Path) -> None:
    training = Training(tmp_path)
    for rank in (7.0, *(3.0,) * 9):  # such as that of a projection to eight numbers
        training.loss(2.0, embedding=SPREAD | {"embedding/effective_rank": rank})
    assert training.printed() == [] and training.noted() == []


def test_assignments_that_are_the_same_for_all_images(tmp_path: Path) -> None:
    """Those of DINO on digits without its centring, whose rows are not in one point."""
    training = Training(tmp_path)
    for told in (1.43, 0.0001, 0.0001):  # the first three steps are too early to say
        training.loss(1.0, embedding=EVEN | {"train/information": told})
    training.loss(1.0, embedding=EVEN | {"train/information": 0.05})
    assert training.printed() == []
    training.loss(1.0, embedding=EVEN | {"train/information": 0.004})
    said = (
        "warning (from step 5 on): the assignments to prototypes have collapsed: they tell 0.0040 nats of which image"
    )
    assert training.printed() == [f"{said} it is"] and training.noted() == ["assignments"]


def test_an_embedding_whose_views_are_as_far_apart_as_images(tmp_path: Path) -> None:
    """Its spread is even. The cosines are those of VICReg on digits with variance=0 covariance=0, from its step 36."""
    apart = [(0.115, 0.098), (0.087, 0.078), (0.090, 0.074), (0.026, 0.033), (0.081, 0.054), (0.025, 0.018)]
    training = Training(tmp_path)
    for positive, negative in apart[:3]:
        training.loss(0.1, embedding=EVEN | {"similarity/positive": positive, "similarity/negative": negative})
    assert training.printed() == []  # the first three steps are too early to say
    for positive, negative in apart:
        training.loss(0.1, embedding=EVEN | {"similarity/positive": positive, "similarity/negative": negative})
    said = "warning (from step 8 on): two views of an image are about as far apart as two images: nearer by {:.1%}, "
    shares = [(positive - negative) / (1 - negative) for positive, negative in apart]
    assert training.printed() == [said.format(sum(shares[:5]) / 5) + "which should be more"]
    assert training.noted() == ["views"]
    # A large mean of all embeddings, as without a norm before the loss, hides nothing.
    for _ in range(5):
        training.loss(0.1, embedding=EVEN | {"similarity/positive": 0.983, "similarity/negative": 0.966})
    assert training.noted() == []


def test_a_loss_that_gets_further_terms_counts_from_there_on(tmp_path: Path) -> None:
    training = Training(tmp_path, facts=LearningFacts(changes=6))
    training.loss(1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
    training.loss(3.0, 3.1, 3.1, 3.1, 3.1, 3.1, 3.1)
    assert training.printed() == [] and training.noted() == []
    training.loss(9.0, 9.0, 9.0)
    assert training.printed() == [FAR.format("5.46").replace("2 at its start", "3 at step 7").replace("6 on", "15 on")]


def test_a_queue_that_fills_raises_the_loss(tmp_path: Path) -> None:
    """The loss counts from there on only."""
    training = Training(tmp_path, facts=LearningFacts(queue_steps=6))
    training.loss(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    rises = "note (from step 2 on): the loss rises until about step 6, while the queue fills with keys: that is normal"
    assert training.printed() == [rises]
    training.loss(6.0, 6.1, 6.2, 6.3, 6.4)
    training.monitor.conclude()
    assert training.printed() == [rises] and training.noted() == ["queue"]
    training.loss(12.0, 12.0, 12.0, 12.0, 12.0)
    assert training.printed() == [
        "warning (from step 14 on): the loss is about 9.74, far above 6 at step 7: the training diverges; use a lower "
        "optimizer.lr"
    ]
