"""The protocol of a method: what the trainer calls, and what a paper implements."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.parameter_groups import ParameterGroup

Tensors = Mapping[str, Tensor]  # by name; the sample axis comes first in each, so that chunks can be concatenated
LoadMethod = Callable[[str], "Method"]  # a reference in a recipe (run, checkpoint or file) -> the method stored there


class Memory(nn.Module):
    """A method's memory from step to step, in persistent buffers of which each rank holds its share.

    sharded: True if the buffers differ by rank; a checkpoint then holds those of every rank.
    """

    sharded: bool = True

    def reshard(self, ranks: int, held: Callable[[str, int], Tensor]) -> None:
        """Fills this rank's share from a checkpoint of another number of ranks. held(name, r) reads buffer `name` of
        rank r of that checkpoint, on the CPU. Raises UserError for buffers whose shapes the number of ranks does not
        explain."""
        raise NotImplementedError


@dataclass(frozen=True)
class DataFacts:
    """Of the training data: how many images and classes there are, and how many of its labelled images each class has;
    counts is () where a method is only loaded, as what was made of them is loaded then."""

    images: int
    classes: int
    counts: tuple[int, ...] = ()


class EpochFeatures(Protocol):
    """Computes features of every training sample once: clean images, in evaluation mode, without gradient.

    embed: (N, 3, size, size) -> (N, D); size: pixels, None: those of the first group of views. Returns this rank's
    block: index (n,) int64 and rows (n, D) fp32. The blocks in rank order are all samples in their order; n may differ
    by one.
    """

    def __call__(self, embed: Callable[[Tensor], Tensor], size: int | None = None) -> tuple[Tensor, Tensor]: ...

    def go_on(self, work: str, done: int, total: int) -> None:
        """Shows that work on the features is done in part, such as the rounds of k-means, which may take minutes. All
        ranks call it together; without it the run may be taken for one that hangs. Ends before_epoch by an exception
        where a rank was told to stop."""
        ...


class Method(nn.Module):
    """A paper's method: its networks, its equation and its memories.

    A loss is the mean over this rank's own samples; the engine averages gradients over ranks; together that is the
    gradient of the global mean. A method's file knows no rank and no chunk, and
    takes device and dtype from its inputs.
    """

    views: ClassVar[int | None] = None  # of each image, in the first group; None: any number
    further_groups: ClassVar[bool] = False  # True: it takes more groups of views than one
    needs: ClassVar[frozenset[str]] = frozenset()  # fields of a batch; data.train without one is refused at the start
    jigsaw: ClassVar[bool] = False  # True: the second view is shuffled patches, data/augment/jigsaw.py
    pairwise: ClassVar[bool] = False  # True: embed takes any number of views, z is (n, V, …), loss takes two of them
    classifies: ClassVar[bool] = False  # True: it has logits
    head_layers: ClassVar[int | str] = 0  # of its ProjectionHead, for fine-tuning; a str: the option with their number
    classes: int = 0  # of its classifier; 0: it has none
    encoder: nn.Module  # trained
    kept: ClassVar[str] = "encoder"  # the module that export, evaluation and a run that starts from this one take
    loss_changes: int = 0  # the epoch from which on its loss has further terms, so that it may rise there
    whole_batch: str = ""  # the reason why its batch cannot be computed in chunks, as a clause; "": it can

    @property
    def sharded(self) -> dict[str, Memory]:
        """The memories whose buffers differ by rank, by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Memory) and m.sharded}

    @property
    def own_buffers(self) -> frozenset[str]:
        """Names of the buffers that differ by rank."""
        return frozenset(f"{name}.{buffer}" for name, memory in self.sharded.items() for buffer in memory.state_dict())

    @property
    def kept_encoder(self) -> nn.Module:
        """The module that `kept` names."""
        return self.get_submodule(self.kept)

    def prepare(self, data: DataFacts) -> None:
        """Makes what depends on the training data. Called once after the constructor, for training and evaluation
        alike. The shapes of its buffers are final: a checkpoint is refused for any others."""

    def load_pretrained(self, load: LoadMethod, fresh: bool) -> None:
        """Loads what its options name from other runs. Called once, after prepare, before training.

        load(reference) is a method as training left it, on the CPU, in eval mode and without gradients. Starting
        weights are loaded only if `fresh` (training starts without a checkpoint of its own), a teacher always. Raises
        UserError for what does not fit.
        """

    def before_epoch(self, epoch: int, features: EpochFeatures) -> None:
        """Makes what holds for an epoch, such as clusters, of features of all samples.

        Called before the first step of each epoch, and again where a run is resumed there; not where it is resumed
        within an epoch, as the checkpoint holds the results. So it draws by (seed, epoch) alone, keeps results in
        buffers, and fills them last: a signal may end it before, by an exception from `features`. Where more than
        seconds pass after the features have come, it calls features.go_on.
        """

    def epoch_order(self, epoch: int) -> Tensor | None:
        """The sample indices of an epoch, in order, as many as it has; None: the recipe's order.

        Called where the epoch begins, after before_epoch, and again where it goes on after a resume. It has to be the
        same each time and on all ranks, so it is made of the seed, the epoch and what before_epoch has kept, and not of
        what update changes."""
        return None

    def forward(self, batch: Batch) -> Tensors:
        return self.embed(batch)

    def arrange(self, batch: Batch) -> Batch:
        """Changes pixels and adds fields: once a step, on this rank's whole batch, without gradient, before it is cut
        into chunks. Chance comes from (seed, step) alone, so that it is the same for any ranks."""
        return batch

    def embed(self, batch: Batch) -> Tensors:
        """Outputs that carry gradient. Called chunk by chunk; never detaches, and does not read the clock."""
        raise NotImplementedError

    def target(self, batch: Batch) -> Tensors:
        """Outputs without gradient (momentum encoder, teacher). Called chunk by chunk."""
        return {}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        """The paper's equation: the mean over this rank's own samples. Stop-gradients belong here."""
        raise NotImplementedError

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        """Updates moving averages, queues and banks. Called after each step of the optimizer."""

    def groups(self) -> Sequence[ParameterGroup]:
        """The parameters that are not trained as the recipe says; of several that hold one the first counts. Asked once
        prepare() has been called."""
        return ()

    def scalars(self) -> dict[str, float]:
        """Further numbers that the monitor logs with the loss, by name."""
        return {}

    def measured(self, z: Tensors, t: Tensors) -> Tensor | None:
        """(N, V, D): V embeddings of each sample, which should be near each other, for the monitor; None: none."""
        return next((x for x in z.values() if x.ndim == 3), None)

    def represent(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, D) features."""
        return self.kept_encoder(images)

    def represent_batch(self, batch: Batch) -> Tensor:
        """(N, D) features that evaluators read. batch: a clean view of each sample, and its fields."""
        return self.represent(batch.views[0][:, 0])

    def logits(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, classes): log-probabilities up to a constant, of a method that classifies."""
        raise NotImplementedError
