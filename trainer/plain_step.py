"""A step of a method without DeepSpeed, in any precision, on a batch that is made here: for the parity tables."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kilobatch.data.batch import HALF_WAY, Batch, Clock, make_batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks import batch_norm, keyed_layers
from kilobatch.methods.parity.standard import GroupShape
from kilobatch.trainer.chunking import Chunking
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.training_features import TrainingFeatures

Norm = Literal["fixed", "global", "local"]  # fixed: with the running statistics, so each sample is normalised alone


class PlainEngine(Engine):
    """The engine's embed, target and backward without DeepSpeed, for parameters of any type."""

    def __init__(self, method: Method, samples: int, **options: Any) -> None:
        """samples: of a rank; options: of EngineOptions."""
        self.method, self.options, self.device = method, EngineOptions(**options), torch.device("cpu")
        self.chunking = Chunking(self.options, method, samples, self.device, self.autocast)
        self.trained = [p for p in method.parameters() if p.requires_grad]
        self.loss_scale = 1.0

    def begin(self, clock: Clock) -> None:
        """Nothing begins: without an optimizer no group of parameters is late."""

    def embed(self, batch: Batch) -> Tensors:
        return plain_embed(self.method, batch)

    def target(self, batch: Batch) -> Tensors:
        return plain_target(self.method, batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def plain_embed(method: Method, batch: Batch) -> Tensors:
    with keyed_layers.drawing(method, batch.keys):
        return method.embed(batch)


def plain_target(method: Method, batch: Batch) -> Tensors:
    with keyed_layers.off(method):
        return method.target(batch)


def begin_epoch(method: Method, whole: Batch) -> None:
    """Calls the method's hook before an epoch. whole: the global batch, whose samples are the training data here."""
    engine = PlainEngine(method, len(whole))
    with torch.no_grad():
        method.before_epoch(0, TrainingFeatures(engine, lambda size: _Block(whole), lambda: False))


class _Block:
    """This rank's block of a batch's samples, of each its first view."""

    def __init__(self, whole: Batch) -> None:
        self.samples, self._whole = len(whole), whole.replaced(views=tuple(x[:, :1] for x in whole.views[:1]))

    def __iter__(self) -> Iterator[Batch]:
        own = torch.arange(self.samples).tensor_split(collectives.world_size())[collectives.rank()]
        yield from map(self._whole.rows, own.split(5))


def random_batch(
    samples: int, groups: Sequence[GroupShape], label: Tensor, fields: Mapping[str, Tensor] | None = None
) -> Batch:
    """A global batch of random pixels in fp64, the same in every process."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(samples, group.count, 3, group.size, group.size) for group in groups]
    views = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return make_batch(views, label=label, clock=HALF_WAY, fields=fields)


def set_norms(method: Method, norm: Norm) -> None:
    """Gives norms random weights, and their mode."""
    for module in batch_norm.norms(method):
        if isinstance(module.weight, nn.Parameter):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        module.train(norm != "fixed")
