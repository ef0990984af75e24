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


def add_paper(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, text: str) -> None:
    """Has the package of papers hold this file alone beside those that are loaded already."""
    folder.mkdir()
    (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(method_source, "FOLDER", folder)
    monkeypatch.setattr(papers, "__path__", [*papers.__path__, str(folder)])
    monkeypatch.delitem(sys.modules, f"kilobatch.methods.papers.{name}", raising=False)
    for made_of_files in (method_source.read_declaration, method_options.options_of, recipe._recipe_of):
        made_of_files.cache_clear()
