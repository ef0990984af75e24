"""Measures of an embedding while it is trained. z: (N, V, D), N samples in V views each; any scale."""

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

ROWS = 1024  # samples that are measured


def measure(z: Tensor) -> dict[str, float]:
    """All measures of this module, of the first ROWS samples, normalised to the unit sphere. One transfer to the host.

    Needs at least two samples and two views.
    """
    z = normalize(z.detach()[:ROWS].float(), dim=-1)
    positive, negative = similarities(z)
    values = {
        "similarity/positive": positive,
        "similarity/negative": negative,
        "embedding/alignment": 2 - 2 * positive,  # Wang & Isola 2020, eq. 4 with α = 2; 0: two views are the same
        "embedding/uniformity": uniformity(z),
        "embedding/std": spread(z),
        "embedding/effective_rank": effective_rank(z.flatten(0, 1)),
    }
    return dict(zip(values, torch.stack([value.double() for value in values.values()]).tolist(), strict=True))


def uniformity(z: Tensor) -> Tensor:
    """log E exp(−2 |x − y|²) over pairs of different samples within one view, the mean over views (Wang & Isola 2020,
    eq. 5 with t = 2, and their code's pairs). 0: all in one point; about −4: evenly spread. z on the unit sphere."""
    samples = len(z)
    views = z.transpose(0, 1)  # (V, N, D)
    exponent = (views @ views.mT).mul_(4).sub_(4)  # −2 |x − y|² = 4 x·y − 4, from −8 to 0: exp needs no maximum first
    exponent.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return (exponent.exp_().sum((1, 2)) / (samples * (samples - 1))).log().mean()


def similarities(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of two views of one sample, and mean cosine of views of two samples. z on the unit sphere.

    A mean of dot products is a dot product of sums, so no N × N matrix is made.
    """
    samples, views, _ = z.shape
    z = z.double()
    whole, own = z.sum((0, 1)).square().sum(), z.sum(1).square().sum()  # all pairs; pairs within samples
    same = z.square().sum()  # pairs of a view with itself
    positive = (own - same) / (samples * views * (views - 1))
    negative = (whole - own) / (samples * (samples - 1) * views**2)
    return positive, negative


def spread(z: Tensor) -> Tensor:
    """√D times the mean over dimensions of the standard deviation over samples (SimSiam, figure 2: 1/√D on an even
    sphere). 1: evenly spread; 0: all in one point. z on the unit sphere."""
    rows = z.flatten(0, 1)
    # Computed in passes over whole rows: std(dim=0) goes down one column after the other, which is ten times slower.
    return (rows - rows.mean(0)).square_().mean(0).sqrt().mean() * math.sqrt(rows.shape[1])


def effective_rank(rows: Tensor) -> Tensor:
    """(M, D) -> exp(entropy of the singular values as a distribution) (Roy & Vetterli 2007, eq. 3): 1 to min(M, D)."""
    rows = rows.double()
    gram = rows.mT @ rows if rows.shape[0] > rows.shape[1] else rows @ rows.mT  # far cheaper than the SVD
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    # An eigenvalue below the Gram matrix's rounding error is noise, and its square root would not be negligible.
    singular = torch.where(singular > 1e-6 * singular.max(), singular, 0)
    share = singular / singular.sum().clamp(min=1e-30)
    return torch.special.entr(share).sum().exp()


def collapse(values: dict[str, float]) -> str | None:
    """A warning that says how the embedding has collapsed, with the number; None if it has not. values: measure()'s."""
    std, rank = values["embedding/std"], values["embedding/effective_rank"]
    if std < 0.05:
        return f"the embedding has collapsed: its spread is {std:.3f} of an even one (all images in one point)"
    if rank < 2:
        return f"the embedding has collapsed: its effective rank is {rank:.2f} (all images on one line)"
    return None
