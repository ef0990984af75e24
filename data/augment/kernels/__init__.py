"""Augmentation on GPUs: Triton kernels, imported only where Triton runs."""
