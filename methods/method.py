"""What the trainer asks of a method."""

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor, nn

from kilobatch.data.batch import Batch

Tensors = Mapping[str, Tensor]  # every tensor leads with the sample axis, so that chunks concatenate
Trained = Callable[[str], "Method"]  # a reference that a recipe holds (run, checkpoint or file) -> what it left


class Memory(nn.Module):
    """What a method remembers from step to step in persistent buffers, each rank its share of a whole.

    sharded: whether the buffers differ by rank; checkpoints then keep every rank's.
    """

    sharded: bool = True

    def reshard(self, ranks: int, held: Callable[[str, int], Tensor]) -> None:
        """Takes this rank's share of a checkpoint of another number of ranks. held(name, r) reads what buffer `name` of
        its rank r was, on the CPU; a share that does not go by the number of ranks alone raises Refusal."""
        raise NotImplementedError


class Method(nn.Module):
    """A paper: its networks, its equation and its memories.

    A loss is the mean over this rank's own samples; the engine averages gradients over ranks; together that is the
    gradient of the global mean. No rank, device, dtype or chunk appears in a method's file.
    """

    views: ClassVar[int | None] = None  # how many of each image it takes; None: any number
    jigsaw: ClassVar[bool] = False  # whether the second view is to be shuffled patches: data/augment/jigsaw.py
    classifies: ClassVar[bool] = False  # whether it has logits
    head_layers: ClassVar[int | str] = 0  # of its ProjectionHead, for fine-tuning; a text: the option that says so
    classes: int = 0  # that it tells apart, if it classifies
    unadapted: ClassVar[tuple[str, ...]] = ()  # names of weights whose steps LARS and LAMB leave as SGD and Adam do
    encoder: nn.Module  # what is kept when training ends
    whole_batch: str = ""  # why its batch cannot be computed in chunks, as a clause; "": it can

    @property
    def sharded(self) -> dict[str, Memory]:
        """The memories whose buffers differ by rank, by name."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Memory) and m.sharded}

    @property
    def own_buffers(self) -> frozenset[str]:
        """Names of the buffers that differ by rank."""
        return frozenset(f"{name}.{buffer}" for name, memory in self.sharded.items() for buffer in memory.state_dict())

    def prepare(self, images: int, classes: int) -> None:
        """Once, after the constructor, for training and evaluation alike: makes what depends on the number of training
        images and of their classes."""

    def take(self, trained: Trained, fresh: bool) -> None:
        """Once, before it is trained, after prepare: takes from other runs what its options name.

        trained(where) is a method as training left it, on the CPU, in eval mode and without gradients. Starting weights
        are taken where `fresh` (training begins, from no checkpoint of its own), and what teaches it always. Raises
        Refusal for what does not fit.
        """

    def forward(self, views: Tensor) -> Tensors:
        return self.embed(views)

    def embed(self, views: Tensor) -> Tensors:
        """views (N, V, 3, H, W) -> outputs that carry gradient. Called chunk by chunk; never detaches."""
        raise NotImplementedError

    def target(self, views: Tensor) -> Tensors:
        """views (N, V, 3, H, W) -> outputs without gradient (momentum encoder, teacher). Called chunk by chunk."""
        return {}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        """The paper's equation: mean over this rank's own samples. Stop-gradients stand here."""
        raise NotImplementedError

    def update(self, z: Tensors, t: Tensors, batch: Batch, progress: float) -> None:
        """After the optimizer's step: moving averages, queues, banks. progress runs from 0 to 1 over the training."""

    def scalars(self) -> dict[str, float]:
        """For the monitor, beside the loss: what else of the method moves."""
        return {}

    def measured(self, z: Tensors, t: Tensors) -> Tensor | None:
        """(N, V, D): what the monitor measures: V embeddings of each sample, which should be near; None: nothing."""
        return next((x for x in z.values() if x.ndim == 3), None)

    def represent(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, D) features that evaluators read."""
        return self.encoder(images)

    def logits(self, images: Tensor) -> Tensor:
        """images (N, 3, H, W) -> (N, classes), of a method that classifies: log-probabilities but for a constant."""
        raise NotImplementedError
