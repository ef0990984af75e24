"""Each paper's formula in the plainest code, under the paper's name."""
