"""Loads a trained encoder for use in Python: the network, and how images are prepared for it."""

from os import PathLike, fspath
from typing import NamedTuple

from torch import Tensor, nn

from kilobatch.data.loading.preprocess import Preprocess
from kilobatch.launch.recipes.references import recipe_of
from kilobatch.launch.worker.pretrained import load_resolved, resolve_reference
from kilobatch.methods.method import Method


class LoadedEncoder(NamedTuple):
    """network: images (N, 3, size, size), prepared -> features (N, D); it is on the CPU, in evaluation mode, without
    gradients. preprocess: one image -> (3, size, size)."""

    network: nn.Module
    preprocess: Preprocess


class Representation(nn.Module):
    """The features of a method that are not its encoder's own, as after fine-tuning from a hidden layer of the head."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor) -> Tensor:
        return self.method.represent(images)


def load_encoder(where: str | PathLike[str]) -> LoadedEncoder:
    """The encoder of a run or an exported file, and how images are prepared for it:
    `network, preprocess = load_encoder("encoder.safetensors")`.

    where: a run's folder or its name under runs/ (the newest whole checkpoint), a checkpoint's folder, or a file that
    `kilobatch export` or import wrote. `network(preprocess(image)[None])` are the features that `kilobatch embed`
    writes of this image, and that the evaluators see. Raises UserError where it is absent or damaged.
    """
    path = resolve_reference(fspath(where)).path
    method, views = load_resolved(path), recipe_of(str(path)).data.groups
    own = type(method).represent is Method.represent
    return LoadedEncoder(method.kept_encoder if own else Representation(method).eval(), Preprocess(views))
