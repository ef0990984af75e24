"""The parts of a method's step on fake tensors: arranged batch, targets, adversarial views, forward, loss, backward,
update."""

from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.launch.planning.fake_tensors import FlopCounter, Traffic
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks import batch_norm, keyed_layers
from kilobatch.trainer import adversarial
from kilobatch.trainer.adversarial import Attack
from kilobatch.trainer.costs.memory_probe import MemoryTracker
from kilobatch.trainer.engine import autocast
from kilobatch.trainer.options import AdversarialOptions

Parts = Mapping[str, int]  # bytes by label, such as "activations"


class FakeParts:
    """The parts of a step, called in order. moments: bytes by label at the peak of each; flops: operations of each.

    z, t: outputs and targets, first of one chunk, then of the batch. They are attributes so that replaced tensors are
    freed at once: a caller's variable would keep them alive, and memory would be counted too large.
    """

    def __init__(
        self,
        method: Method,
        batch: Batch,
        chunks: int,
        precision: str,
        tracker: MemoryTracker,
        counter: FlopCounter,
        sent: Traffic,
    ) -> None:
        self.method, self.batch, self.chunk, self.precision = method, batch, batch.chunks(chunks)[0], precision
        self.tracker, self.counter, self.sent = tracker, counter, sent
        self.z: Tensors = {}
        self.t: Tensors = {}
        self.adversarial: AdversarialOptions | None = None
        self.kept = 0
        self.moments: dict[str, Parts] = {}
        self.flops: Counter[str] = Counter()

    def arrange(self) -> None:
        if type(self.method).arrange is Method.arrange:
            return
        self._begin("arranged samples", "arrange")
        with torch.no_grad():
            self.batch = self.method.arrange(self.batch)
        self.chunk = self.batch.first(len(self.chunk))
        self._count("arrange")
        self._end_moment("arrange")

    def targets(self) -> None:
        self._begin("outputs", "targets")
        with torch.no_grad(), autocast(self.precision, "cpu"), keyed_layers.off(self.method):
            self.t = self.method.target(self.chunk)
        self._count("targets")
        self._end_moment("targets")

    def forward(self) -> None:
        self._begin("activations", "BatchNorm")
        with autocast(self.precision, "cpu"):
            self.z = adversarial.embed(self.method, self.chunk, self._embed)
        self.kept = self.tracker.labelled["activations"]
        self._count("forward")
        self._end_moment("forward")

    def _embed(self, batch: Batch) -> Tensors:
        with keyed_layers.drawing(self.method, batch.keys):
            return self.method.embed(batch)

    def attack(self, options: AdversarialOptions) -> None:
        """The adversarial views of one chunk, as in trainer/adversarial.py."""
        self.adversarial, samples, size = options, len(self.batch), len(self.chunk)
        attack = Attack(self.method, options, partial(autocast, self.precision, "cpu"))
        part, at_once = adversarial.first_views(self.chunk), samples == size
        self._begin("activations", "BatchNorm")
        with torch.set_grad_enabled(at_once):
            z = attack.start(part)
        self._count("attack")
        self._begin("loss and embeddings", "loss")
        gradient = attack.gradient(_whole(z, samples, leaf=False), _whole(self.t, samples, leaf=False), self.batch)
        self._count("loss")
        self._begin("activations", "BatchNorm")
        attack.moved(part, z if at_once else None, {name: g[:size] for name, g in gradient.items()})
        self._count("attack")
        self._begin("adversarial views", "")
        self.batch = self.batch.with_fields(**{adversarial.PIXELS: torch.empty_like(self.batch.views[0][:, :1])})
        self.chunk = self.batch.first(size)
        self._end_moment("attack")

    def _loss(self, z: Tensors) -> Tensor:
        return adversarial.loss(self.method, z, self.t, self.batch, self.adversarial)

    def loss_and_backward(self) -> None:
        self._begin("loss and embeddings", "loss")
        loss = self._loss(self.z)
        self._count("loss")
        self._begin("activations", "BatchNorm")
        loss.backward()
        self._count("backward")
        self._end_moment("backward")

    def loss_and_backward_in_chunks(self) -> None:
        """The loss of the whole batch and its gradient with respect to the embeddings; then the backward of one chunk,
        as in trainer/step.py."""
        samples, size = len(self.batch), len(self.chunk)
        self._begin("loss and embeddings", "loss")
        leaves = _whole(self.z, samples, leaf=True)
        self.t = _whole(self.t, samples, leaf=False)
        loss = self._loss(leaves)
        loss.backward()
        self._count("loss")
        self._end_moment("loss")
        self._begin("activations", "BatchNorm")
        gradients = {name: leaf.grad[:size] for name, leaf in leaves.items() if leaf.grad is not None}
        products = [(x * gradients[name]).sum() for name, x in self.z.items() if name in gradients]
        torch.stack(products).sum().backward()
        self.z = leaves
        self._count("backward")
        self._end_moment("backward")

    def update(self) -> None:
        self._begin("outputs", "BatchNorm's running statistics")
        batch_norm.commit(self.method)
        self._begin("outputs", "memories")
        clean, _ = adversarial.split(self.z)
        self.method.update({name: x.detach() for name, x in clean.items()}, self.t, self.batch)

    def _begin(self, label: str, purpose: str) -> None:
        """label: of the memory allocated from here on; purpose: of the bytes sent from here on."""
        self.tracker.label, self.sent.purpose = label, purpose

    def _count(self, part: str) -> None:
        """Adds the operations since the last call to those of this part."""
        self.flops[part] += self.counter.get_total_flops() - sum(self.flops.values())

    def _end_moment(self, name: str) -> None:
        self.moments[name] = dict(self.tracker.at_peak)
        self.tracker.restart()


def _whole(x: Tensors, n: int, leaf: bool) -> dict[str, Tensor]:
    """Outputs of the whole batch in the shapes of one chunk's; as leaves in fp32 as in trainer/step.py."""
    whole = {name: torch.empty(n, *part.shape[1:], dtype=part.dtype) for name, part in x.items()}
    if not leaf:
        return whole
    return {k: x.float().requires_grad_() if x.is_floating_point() else x for k, x in whole.items()}
