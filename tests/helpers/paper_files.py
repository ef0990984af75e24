"""Methods in files of a test's own, which recipes name as they name those of methods/papers/."""

import sys
from pathlib import Path

import pytest

from kilobatch.launch.recipes import method_options, method_source, recipe
from kilobatch.methods import papers

WORDS = '''
"""A method that reads tokens beside images, and adds a field for each batch."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.encoder import Encoder


class Words(Method):
    """Draws an image to the mean of its words."""

    views: ClassVar[int | None] = 1
    needs: ClassVar[frozenset[str]] = frozenset({"tokens", "weight"})

    def __init__(self, encoder: Encoder, *, dim: int = 8) -> None:
        super().__init__()
        self.encoder, self.words = encoder, nn.Embedding(50, dim)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(encoder.features, dim))

    def arrange(self, batch: Batch) -> Batch:
        assert not torch.is_grad_enabled()
        return batch.with_fields(mixed=batch.views[0][:, 0].flip(0))

    def embed(self, batch: Batch) -> Tensors:
        words = self.words(batch.fields["tokens"]).mean(1)  # (n, D)
        return {"image": self.head(self.encoder(batch.fields["mixed"])), "words": words}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        return ((z["image"] - z["words"]).pow(2).sum(1) * batch.fields["weight"]).mean()
'''

EVERYTHING = '''
"""A method with every hook of the protocol: two sizes, fields, clusters before an epoch and an order made of them."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.memories.momentum_encoder import MomentumEncoder
from kilobatch.methods.method import DataFacts, EpochFeatures, Method, Tensors
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.parameter_groups import ParameterGroup


class Everything(Method):
    """Draws views to their teacher's first view, to a cluster and to their words. late: when `last` begins."""

    views: ClassVar[int | None] = 2
    further_groups: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"tokens"})
    kept: ClassVar[str] = "teacher.network"
    cluster: Tensor

    def __init__(self, encoder: Encoder, *, late: float = 1.0) -> None:
        super().__init__()
        self.encoder, self.late, self.teacher = encoder, late, MomentumEncoder(encoder, own_statistics=True)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(encoder.features, 8))
        self.last, self.words = nn.Linear(8, 3, bias=False), nn.Embedding(50, 8)

    def prepare(self, data: DataFacts) -> None:
        self.register_buffer("cluster", torch.zeros(data.images, dtype=torch.int64))

    def groups(self) -> Sequence[ParameterGroup]:
        return [ParameterGroup("last", from_epoch=self.late)]

    def before_epoch(self, epoch: int, features: EpochFeatures) -> None:
        index, rows = features(self.teacher)
        found = torch.zeros_like(self.cluster)
        found[index] = rows[:, :3].argmax(1) + (index + epoch) % 2
        features.go_on("clusters", 1, 1)
        self.cluster.copy_(collectives.all_reduce_sum(found))

    def epoch_order(self, epoch: int) -> Tensor:
        return self.cluster.argsort(stable=True).roll(epoch)

    def arrange(self, batch: Batch) -> Batch:
        return batch.with_fields(mixed=batch.views[0][:, 0].lerp(batch.views[0][:, 1], 0.3))

    def embed(self, batch: Batch) -> Tensors:
        pixels = [batch.fields["mixed"][:, None], *batch.views]
        z = [self.head(self.encoder(x.flatten(0, 1))).unflatten(0, x.shape[:2]) for x in pixels]
        return {"z": torch.cat(z, 1), "words": self.words(batch.fields["tokens"]).mean(1)}

    def target(self, batch: Batch) -> Tensors:
        return {"t": self.teacher(batch.views[0][:, 0])}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        scores = self.last(z["z"].float()).flatten(0, 1)
        labels = self.cluster[batch.index].clamp(max=2).repeat_interleave(z["z"].shape[1])
        near = (z["z"] - z["words"][:, None]).square().mean() + (z["z"].mean((1, 2)) - t["t"].mean(1)).square().mean()
        return nn.functional.cross_entropy(scores, labels) + near

    def update(self, z: Tensors, t: Tensors, batch: Batch) -> None:
        self.teacher.follow(self.encoder, 0.9 + 0.1 * batch.clock.after)

    def represent_batch(self, batch: Batch) -> Tensor:
        return torch.cat([self.represent(batch.views[0][:, 0]), batch.fields["tokens"].float() / 50], 1)
'''


def add_paper(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, text: str) -> None:
    """Has the package of papers hold this file alone beside those that are loaded already."""
    folder.mkdir()
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(method_source, "FOLDER", folder)
    monkeypatch.setattr(papers, "__path__", [str(folder), *papers.__path__])
    monkeypatch.delitem(sys.modules, f"kilobatch.methods.papers.{name}", raising=False)
    for made_of_files in (method_source.read_declaration, method_options._options_of, recipe._recipe_of):
        made_of_files.cache_clear()
