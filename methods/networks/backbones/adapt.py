"""Layers of a library's network replaced by ours: norms over the batch, and what draws in training."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from kilobatch.data.errors import UserError
from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.keyed_layers import use_keyed_layers
from kilobatch.methods.networks.options import Mode

# Norms of timm that see other samples in training and have no form of ours, and what may stand for them.
REFUSED = {
    "SplitBatchNorm2d": "BatchNorm2d",
    "EvoNorm2dB0": "EvoNorm2dS0",
    "EvoNorm2dB1": "EvoNorm2dS0",
    "EvoNorm2dB2": "EvoNorm2dS0",
    "InplaceAbn": "BatchNorm2d",
}
# BatchNorms whose forward is torch's own, but for an activation that follows it.
PLAIN = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "BatchNormAct2d", "SyncBatchNormAct")


class NormAct(BatchNorm):
    """BatchNorm with what timm's BatchNormAct2d does after it: drop, then activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def use_our_layers(network: nn.Module, mode: Mode) -> None:
    """Replaces the network's BatchNorms and the layers that draw in training, with the same names and values.

    Raises UserError, by name, for layers that depend on other samples or draw, and have no form of ours.
    """
    norms: dict[int, BatchNorm] = {}  # a norm may stand in several places
    for name, module in list(network.named_modules(remove_duplicate=False)):
        _refuse(name, module)
        if isinstance(module, _BatchNorm):
            norm = norms.setdefault(id(module), _ours(name, module, mode))
            assert name, "a network is more than one layer"
            network.set_submodule(name, norm)
        elif getattr(module, "fused_attn", False) and getattr(getattr(module, "attn_drop", None), "p", 0):
            # The fused form draws by itself, with the rate of this dropout; the plain form calls the layer.
            setattr(module, "fused_attn", False)  # noqa: B010
    use_keyed_layers(network)
    for name, p in network.named_parameters():
        if p.ndim == 0:
            raise UserError(
                f"the encoder's parameter {name} has no dimensions, which DeepSpeed cannot take; make it of shape (1,)"
            )


def _refuse(name: str, module: nn.Module) -> None:
    kind = type(module).__name__
    if kind in REFUSED:
        raise UserError(
            f"the encoder's layer {name} is a {kind}, whose output for a sample depends on the other samples of its "
            f"chunk, so that results would depend on the number of ranks and chunks; use {REFUSED[kind]}"
        )
    if isinstance(module, _BatchNorm) and kind not in PLAIN:
        raise UserError(
            f"the encoder's layer {name} is a {kind}, a BatchNorm with a forward of its own, which cannot be replaced "
            "by one that is the same for any ranks and chunks; use BatchNorm2d, or a norm of each sample such as "
            "GroupNorm"
        )
    if isinstance(module, _BatchNorm) and (module.momentum is None or not module.track_running_stats):
        raise UserError(
            f"the encoder's layer {name} is a {kind} with momentum={module.momentum} and "
            f"track_running_stats={module.track_running_stats}; use a number and True"
        )
    if isinstance(module, _InstanceNorm) and module.track_running_stats:
        raise UserError(
            f"the encoder's layer {name} is a {kind} with track_running_stats=True, which each rank would track by "
            "itself; use False"
        )


def _ours(name: str, theirs: _BatchNorm, mode: Mode) -> BatchNorm:
    parts: dict[str, Any] = dict(theirs.named_children())
    kind = NormAct if parts else BatchNorm
    assert theirs.momentum is not None, "others are refused"
    ours = kind(theirs.num_features, mode, eps=theirs.eps, momentum=theirs.momentum, affine=theirs.affine)
    if isinstance(ours, NormAct):
        ours.drop = parts.pop("drop", nn.Identity())
        ours.act = parts.pop("act", nn.Identity())
        assert not parts, f"{name}: {list(parts)}"
    if theirs.affine and theirs.bias is None:
        ours.bias = None
    with torch.no_grad():
        for own, value in theirs.state_dict().items():
            ours.get_parameter(own).copy_(value) if own in ("weight", "bias") else None
            if own in ("running_mean", "running_var", "num_batches_tracked"):
                ours.get_buffer(own).copy_(value)
    return ours
