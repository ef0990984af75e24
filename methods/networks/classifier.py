"""The linear classifier, and the check that every image has a label."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from kilobatch.data.errors import UserError


class Classifier(nn.Linear):
    """A linear layer (N, features) -> logits (N, classes), in fp32 at least, whatever the autocast type.

    Weights start from the SimCLR authors' normal distribution of standard deviation 0.01 (google-research/simclr,
    model_util.py, linear_layer), or, if zero, from zeros, as in their fine-tuning (--zero_init_logits_layer=True).
    """

    def __init__(self, features: int, classes: int, zero: bool) -> None:
        super().__init__(features, classes)
        nn.init.normal_(self.weight, std=0.0 if zero else 0.01)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(self.weight.dtype), self.weight, self.bias)


def refuse_unlabelled(label: Tensor) -> None:
    """Raises UserError if a label is -1, on a CPU alone: on an accelerator the host would have to wait for the answer,
    and torch's cross-entropy fails an assertion at such a label there. label (N,) int64."""
    if label.device.type != "cpu" or isinstance(label, FakeTensor):
        return
    if unlabelled := int((label < 0).sum()):
        raise UserError(
            f"{unlabelled} of {len(label)} images have no label, and this method learns from labels alone; use "
            "data.unlabelled=drop"
        )
