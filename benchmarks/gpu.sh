#!/usr/bin/env bash
# What only a GPU can show: CIFAR-10 at lightly's setting, ResNet-50's step rate in bf16, NT-Xent at 32,768 pairs.
# usage: benchmarks/gpu.sh FOLDER-OF-CIFAR-10
set -euo pipefail
kilobatch train simclr_cifar10 "data.train=cifar10:$1" "data.test=cifar10:$1" schedule.epochs=200 engine.precision=bf16
python - <<'P'
import time

import torch

from methods.losses import nt_xent

z1, z2 = (torch.randn(32768, 128, device="cuda", requires_grad=True) for _ in range(2))
for _ in range(3):
    start = time.perf_counter()
    nt_xent(z1, z2, 0.1).backward()
    torch.cuda.synchronize()
    print(f"NT-Xent, 32768 pairs: {time.perf_counter() - start:.3f} s, {torch.cuda.max_memory_allocated() >> 20} MiB")
P
