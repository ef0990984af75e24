"""Notices a training that does not learn, by the values that it logs: its loss, its embedding, its k-NN accuracy.

A rise of the loss while a queue fills is normal, and is explained.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kilobatch.trainer.monitor.embedding_metrics import collapse
from kilobatch.trainer.monitor.metrics_file import read_metrics
from kilobatch.trainer.monitor.progress_file import Note, NoteKind

LOSS, RANK, INFORMATION = "train/loss", "embedding/effective_rank", "train/information"
WINDOW = 5  # logged values of which the mean is compared, since single ones vary
FAR, LEAST = 0.5, 0.5  # the rise that is far above the first loss: a share of it, and at the least so much
PATIENCE = 0.1  # share of the steps before which neither k-NN nor the views' distance need be better than untrained
# An embedding that has less than so many directions left, and less than that share of those at its start, is noted. One
# without a stop-gradient behind a norm ends at two to four, and keeps its spread.
DIRECTIONS, KEPT = 4.0, 0.25
TOLD = 0.02  # nats; DINO without centring is below it after an eighth of its recipe for digits, and else above 0.8
NEARER = 0.02  # share of two images' distance by which the views of one are nearer, at the least
# by the logged name of an accuracy: that of the untrained encoder by the same k-NN
UNTRAINED = {"knn_sample/top1": "knn_sample/untrained", "knn/top1": "knn/untrained"}


@dataclass(frozen=True)
class LearningFacts:
    """What the checks know of a training. queue_steps: after how many steps its queue holds keys of this training
    alone, 0: there is none; knn: the settings and images of its k-NN, in words; changes: after how many steps its loss
    gets further terms, so that it is another one."""

    queue_steps: int = 0
    knn: str = ""
    changes: int = 0


class LearningChecks:
    """The checks of one training.

    metrics: metrics.jsonl, from which a resumed run takes its first loss; earlier: what was noted before a resume at
    start_step.
    """

    def __init__(
        self, metrics: Path, total_steps: int, start_step: int, facts: LearningFacts, earlier: Iterable[Note] = ()
    ) -> None:
        self._metrics, self._total, self._facts = metrics, total_steps, facts
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._nearer: deque[float] = deque(maxlen=WINDOW)
        self._firsts: dict[tuple[str, int], tuple[int, float]] = {}
        self._standing = {note.kind: note for note in earlier if note.step <= start_step}
        self._said = {*self._standing}
        self._last = start_step  # of those whose loss was looked at

    @property
    def standing(self) -> list[Note]:
        """What is to be said of the training as it is now."""
        return list(self._standing.values())

    def look(self, step: int, values: Mapping[str, float]) -> list[Note]:
        """Takes values that were written to metrics.jsonl. Returns the notes to print: each kind once."""
        if LOSS in values:
            if self._last <= self._facts.changes < step:
                self._losses.clear()
            self._last = step
            self._losses.append(values[LOSS])
            self._look_at_loss(step)
        if "embedding/std" in values:
            self._note("collapse", step, collapse(dict(values)) or self._few_directions(step, values[RANK]))
        if INFORMATION in values and step >= PATIENCE * self._total:
            told = values[INFORMATION]
            text = f"the assignments to prototypes have collapsed: they tell {told:.4f} nats of which image it is"
            self._note("assignments", step, text if told < TOLD else None)
        if {"similarity/positive", "similarity/negative"} <= values.keys() and step >= PATIENCE * self._total:
            self._look_at_views(step, values["similarity/positive"], values["similarity/negative"])
        self._look_at_accuracy(step, values)
        new = [note for note in self.standing if note.kind not in self._said]
        self._said |= {note.kind for note in new}
        return new

    def _look_at_loss(self, step: int) -> None:
        now = sum(self._losses) / len(self._losses)
        if step <= self._facts.queue_steps:
            if (first := self._first(LOSS, 0)) and now > first[1] + 0.1 * max(1.0, abs(first[1])):
                until = f"until about step {self._facts.queue_steps}"
                self._note("queue", step, f"the loss rises {until}, while the queue fills with keys: that is normal")
            return
        after = max(self._facts.queue_steps, self._facts.changes if step > self._facts.changes else 0)
        first = self._first(LOSS, after)
        if first is None or len(self._losses) < WINDOW:
            return
        far = now > first[1] + max(LEAST, FAR * abs(first[1]))
        start = f"{first[1]:.3g} at step {first[0]}" if after else f"{first[1]:.3g} at its start"
        text = f"the loss is about {now:.3g}, far above {start}: the training diverges; use a lower optimizer.lr"
        self._note("loss", step, text if far else None)

    def _few_directions(self, step: int, rank: float) -> str | None:
        """What is to be said where few directions of an embedding are left. At the start a healthy one may pass through
        such a state."""
        first = self._first(RANK, 0)
        if first is None or step < PATIENCE * self._total or rank >= DIRECTIONS or rank > KEPT * first[1]:
            return None
        fall = f"its effective rank is {rank:.1f}, at its start it was {first[1]:.0f}"
        return f"the embedding has nearly collapsed: {fall} (all images along a few directions)"

    def _look_at_views(self, step: int, positive: float, negative: float) -> None:
        """Of mean cosines. An embedding may shrink to zero while its directions stay spread, as VICReg's does without
        its variance term. Then no other sign but k-NN's shows that it tells nothing."""
        apart = max(1 - negative, 1e-12)  # 0: all in one point, which is noted as a collapse
        self._nearer.append((positive - negative) / apart)  # 1 - d^2(two views) / d^2(two images), on the unit sphere
        now = sum(self._nearer) / len(self._nearer)
        text = f"two views of an image are about as far apart as two images: nearer by {now:.1%}, which should be more"
        self._note("views", step, text if len(self._nearer) == WINDOW and now < NEARER else None)

    def _look_at_accuracy(self, step: int, values: Mapping[str, float]) -> None:
        values = {name.removeprefix("final/"): value for name, value in values.items()}
        for name, before in UNTRAINED.items():
            if name in values and before in values:
                now, then = values[name], values[before]
                poor = now <= then < 1 and step >= PATIENCE * self._total
                compared = f"{now:.1%}, not above the {then:.1%} of the untrained encoder"
                text = f"k-NN of the encoder is {compared} ({self._facts.knn})"
                self._note("knn", step, text if poor else None)
                return

    def _note(self, kind: NoteKind, step: int, text: str | None) -> None:
        """Notes it, with the step at which it was first so; text: None: it is not, or no longer."""
        if text is None:
            self._standing.pop(kind, None)
        elif kind in self._standing:
            first = self._standing[kind].step
            self._standing[kind] = Note(kind=kind, step=first, text=text)
        else:
            self._standing[kind] = Note(kind=kind, step=step, text=text)

    def _first(self, name: str, after: int) -> tuple[int, float] | None:
        """The step and the first logged value of that name after so many steps; None before there is one."""
        if (name, after) not in self._firsts:
            lines = ((line["step"], line.get(name)) for line in read_metrics(self._metrics))
            found = next(((step, value) for step, value in lines if step > after and isinstance(value, float)), None)
            if found is None:
                return None
            self._firsts[name, after] = found
        return self._firsts[name, after]
