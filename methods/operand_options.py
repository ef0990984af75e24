"""What the matrix products of a loss are made of. Without torch, for recipes."""

from typing import Literal

# Sums are fp32 in each. tf32 is fp32 where there are no tensor cores. Exponentials, logarithms, positives and gradients
# are fp32 (fp64 for fp64 inputs, which are computed with as they are).
Operands = Literal["fp32", "tf32", "bf16", "fp16"]
