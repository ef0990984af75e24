#!/usr/bin/env bash
# Benchmarks that need a GPU: correctness and time of the kernels and of torch's operations; loader, loss and step with
# their limits; a global batch of 4096 on one GPU; CIFAR-10 at lightly's setting.
# usage: benchmarks/gpu.sh FOLDER-OF-CIFAR-10
set -euo pipefail
python -m benchmarks.kernels
KILOBATCH_KERNELS=all python -m benchmarks.kernels
KILOBATCH_KERNELS=off python -m benchmarks.kernels
kilobatch bench --device cuda
python -m benchmarks.one_gpu
kilobatch train simclr_cifar10_lightly "data.train=cifar10:$1" "data.test=cifar10:$1"
