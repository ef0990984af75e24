"""Fine-tuning: Chen et al. 2020, SimCLRv2, arxiv.org/abs/2006.10029, section 2, "Fine-tuning".

Authors' code: github.com/google-research/simclr, run.py with --train_mode=finetune and --ft_proj_selector.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.data.errors import UserError
from kilobatch.methods.method import DataFacts, LoadMethod, Method, Tensors
from kilobatch.methods.networks.classifier import Classifier, refuse_unlabelled
from kilobatch.methods.networks.encoder import Encoder
from kilobatch.methods.networks.heads import ProjectionHead, hidden_layers
from kilobatch.methods.networks.options import LastLayerDim, refuse_layers
from kilobatch.methods.options import Reference
from kilobatch.methods.parameter_groups import ParameterGroup


class FineTune(Method):
    """The encoder, the first `layer` layers of the projection head and a linear classifier, all trained on labels.

    start: run or file with the encoder and head to start from; null: from scratch. layer: layers of the head that are
    kept; 0 drops the whole head, as is usual; the authors keep 1. hidden: the width of the head's layers; null: the
    encoder's features. dim: the width of the projections (the authors' proj_out_dim) if `layer` is the head's last,
    which has neither bias nor ReLU; null: all layers that are kept are hidden ones.

    Norms use their batch's statistics in training, as the authors' do. LARS
    does not adapt the classifier's steps (exclude_from_weight_decay, "head_supervised"). Every image has a label.
    """

    views: ClassVar[int | None] = 1
    classifies: ClassVar[bool] = True
    head_layers: ClassVar[int | str] = "layer"
    classifier: Classifier

    def __init__(
        self,
        encoder: Encoder,
        *,
        start: Reference | None = None,
        layer: Annotated[int, Field(ge=0)] = 1,
        hidden: Annotated[int, Field(gt=0)] | None = None,
        dim: LastLayerDim = None,
    ) -> None:
        super().__init__()
        self.encoder, self.start, self.layer, self.dim = encoder, start, layer, dim
        width = hidden or encoder.features
        if dim is None:
            self.hidden_layers = hidden_layers(encoder.features, width, layer, encoder.norm)
        else:
            self.hidden_layers = ProjectionHead(encoder.features, width, dim, encoder.norm, layer).layers
        self.features = (dim or width) if layer else encoder.features  # the classifier's input

    def prepare(self, data: DataFacts) -> None:
        if data.classes < 2:
            raise UserError(
                f"data.train has {data.classes} classes, and there is nothing to tell apart; a folder: source needs a "
                "folder for each class"
            )
        self.classes = data.classes
        self.classifier = Classifier(self.features, data.classes, zero=self.start is not None)

    def load_pretrained(self, load: LoadMethod, fresh: bool) -> None:
        if fresh and self.start is not None:
            _load_start(self, load(self.start))

    def groups(self) -> Sequence[ParameterGroup]:
        return [ParameterGroup("classifier.weight", adapt=False)]

    def represent(self, images: Tensor) -> Tensor:
        return self.hidden_layers(self.encoder(images))

    def logits(self, images: Tensor) -> Tensor:
        return self.classifier(self.represent(images))

    def embed(self, batch: Batch) -> Tensors:
        return {"logits": self.logits(batch.views[0][:, 0])}  # (N, classes)

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        refuse_unlabelled(batch.label)
        return F.cross_entropy(z["logits"], batch.label)


def _load_start(method: FineTune, source: Method) -> None:
    """Copies encoder and first head layers of the source, running statistics too. Raises UserError for a mismatch."""
    _copy(
        method.encoder,
        source.kept_encoder,
        f"method.start '{method.start}' has another encoder",
        "give this recipe the section encoder of what it starts from",
    )
    layers, count, dim = _head(source)
    refuse_layers(method.layer, method.dim, str(method.start), count, dim)
    if method.layer:
        _copy(
            method.hidden_layers,
            layers[: 3 * method.layer],
            f"method.start '{method.start}' has a head of another width",
            f"use method.hidden={len(next(layers.parameters()))}",
        )


def _head(source: Method) -> tuple[nn.Sequential, int, int | None]:
    """The layers of a source's head, their number, and the width of the projections if its last layer makes them."""
    if isinstance(source, FineTune):
        return source.hidden_layers, source.layer, source.dim
    head = getattr(source, "head", None)
    if not isinstance(head, ProjectionHead):
        return nn.Sequential(), 0, None
    return head.layers, head.hidden_count + 1, head.dim


def _copy(target: nn.Module, source: nn.Module, mismatch: str, way_out: str) -> None:
    """Raises UserError for the first tensor that only one of them has, or whose shapes differ."""
    new, old = ({name: tuple(x.shape) for name, x in module.state_dict().items()} for module in (target, source))
    for name in {**old, **new}:
        if new.get(name) != old.get(name):
            raise UserError(
                f"{mismatch}: its {name} is {old.get(name, 'absent')}, here {new.get(name, 'absent')}; {way_out}"
            )
    target.load_state_dict(source.state_dict())
