"""Augments a batch on its device: by Triton kernels where they run, else by torch's operations."""

import torch
from torch import Tensor

from kilobatch.data.augment.torch_ops import augment_by_torch
from kilobatch.data.triton_support import use_kernels
from kilobatch.data.views.options import Views


def augment(images: Tensor, keys: Tensor, views: Views, dtype: torch.dtype = torch.float32) -> Tensor:
    """images (N, V, 3, H, W) uint8 on any device, keys (N, V) int64 on the host -> the views, normalised."""
    if use_kernels("augmentation", images.device, "affine moves have no kernel" if views.affine else None):
        from kilobatch.data.augment.kernels import photometric

        return photometric.augment(images, keys, views, dtype)
    return augment_by_torch(images, keys, views).to(dtype)
