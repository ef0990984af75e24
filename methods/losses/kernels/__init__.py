"""The losses as Triton kernels; imported only where Triton runs."""
