"""Reuse of memory: an array is lent again once nothing shares its memory."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kilobatch.data.loading.buffer_pool import MAX_SPARE, BufferPool


def test_memory_is_used_again_once_nobody_holds_it():
    buffers = BufferPool((4, 3), np.float32)
    tensor = buffers.borrow()
    address = tensor.data_ptr()
    assert tensor.shape == (4, 3) and tensor.dtype == torch.float32
    del tensor
    assert buffers.borrow().data_ptr() == address


def test_memory_is_not_used_again_while_anything_shares_it():
    shares: dict[str, Callable[[Tensor], object]] = {
        "a part": lambda tensor: tensor[1:],
        "another shape": lambda tensor: tensor.permute(1, 0),
        "an array": lambda tensor: tensor.numpy()[:1],
        "storage": lambda tensor: tensor.untyped_storage(),
        "a graph": lambda tensor: tensor * torch.ones(3, requires_grad=True),
    }
    for name, share in shares.items():
        buffers = BufferPool((4, 3), np.float32)
        tensor = buffers.borrow()
        address = tensor.data_ptr()
        held = [share(tensor)]
        del tensor
        assert buffers.borrow().data_ptr() != address, name
        held.clear()
        assert address in (buffers.borrow().data_ptr(), buffers.spare[0].ctypes.data), name


def test_little_is_kept():
    buffers = BufferPool((4, 3), np.float32)
    held = [buffers.borrow() for _ in range(3 * MAX_SPARE)]
    del held
    assert len(buffers.spare) == MAX_SPARE
