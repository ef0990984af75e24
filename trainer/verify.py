"""The parity table: gradients and memories of any ranks x chunks against the paper's formula in one process, fp64."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from data.batch import Batch
from methods import across, norm
from methods.method import Method, Tensors
from methods.verify import Construction, Loss, Standard, standard
from trainer.engine import Engine
from trainer.options import EngineOptions
from trainer.ranks import run_ranks
from trainer.step import forward_backward, join

Norm = Literal["fixed", "global", "local"]  # fixed: by the running statistics, so that samples do not meet in it
Precision = Literal["fp64", "fp32"]
LIMIT: dict[Precision, float] = {"fp64": 1e-12, "fp32": 1e-5}
DTYPE: dict[Precision, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32}
SIDE = 12


@dataclass(frozen=True)
class Layout:
    norm: Norm
    ranks: int
    chunks: int


LAYOUTS = (
    *(Layout("fixed", ranks, chunks) for ranks, chunks in ((1, 1), (1, 4), (2, 1), (2, 2), (4, 1))),
    *(Layout("global", ranks, 1) for ranks in (1, 2, 4)),
    *(Layout("local", ranks, chunks) for ranks, chunks in ((1, 4), (2, 2), (4, 1))),
)


@dataclass(frozen=True)
class Row:
    """One comparison with the formula. error: |got - want| / |want| over all parameters' gradients, or all keys."""

    name: str
    norm: Norm
    ranks: int
    chunks: int
    precision: Precision
    error: float
    cosine: float
    norm_ratio: float
    right: bool  # whether it ought to agree

    @property
    def agrees(self) -> bool:
        return self.error <= LIMIT[self.precision]

    @property
    def ok(self) -> bool:
        """What is right agrees, what is wrong is found out."""
        return self.agrees == self.right


def verify(name: str) -> Iterator[Row]:
    """The parity table of methods/<name>.py on real process groups, then constructions that the check must tell apart.

    Raises Refusal for a method without a table.
    """
    expected = standard(name)
    wants = {parts_of: _reference(expected, expected.formula, *parts_of) for parts_of in {_parts(x) for x in LAYOUTS}}
    for ranks in (1, 2, 4):
        layouts = [layout for layout in LAYOUTS if layout.ranks == ranks]
        constructions = expected.constructions if ranks == 4 else ()
        asked = name, layouts, len(constructions)
        # Rank 0 speaks for all: after averaging, every rank holds the same gradients, and each gathers what is kept.
        got = _found(*asked) if ranks == 1 else run_ranks(ranks, _found, *asked, timeout=600.0)[0]
        for layout in layouts:
            for precision in DTYPE:
                gradient, kept = got[layout, precision]
                want = wants[_parts(layout)]
                yield _row(name, layout, precision, gradient, want.gradient, right=True)
                if kept is not None and want.kept is not None:
                    yield _row(f"{name}, what it remembers", layout, precision, kept, want.kept, right=True)
        for k, construction in enumerate(constructions):
            layout = Layout("fixed", ranks, 1)
            want = _reference(expected, construction.formula, "fixed", 1)
            yield _row(construction.name, layout, "fp64", got[k].gradient, want.gradient, right=construction.right)


def _row(name: str, layout: Layout, precision: Precision, got: Tensor, want: Tensor, right: bool) -> Row:
    got, want = got.double().flatten(), want.flatten()
    error = ((got - want).norm() / want.norm()).item()
    cosine = torch.cosine_similarity(got, want, dim=0).item()
    ratio = (got.norm() / want.norm()).item()
    return Row(name, layout.norm, layout.ranks, layout.chunks, precision, error, cosine, ratio, right)


def _parts(layout: Layout) -> tuple[Norm, int]:
    """What the formula is computed with: in how many parts a local norm sees the batch."""
    return layout.norm, layout.ranks * layout.chunks if layout.norm == "local" else 1


def _method(expected: Standard, mode: Norm) -> Method:
    """The same weights in every process; fp64."""
    torch.manual_seed(0)
    method = expected.build("local" if mode == "local" else "global").double()
    for module in norm.norms(method):
        if isinstance(module.weight, nn.Parameter):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        module.train(mode != "fixed")
    return method


def _batch(samples: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(samples, 2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return Batch(views, torch.arange(samples), torch.zeros(samples, dtype=torch.int64))


class _Found(NamedTuple):
    """gradient: of all parameters, averaged over ranks; kept (m, D): what all ranks remember, in the order of rows."""

    gradient: Tensor
    kept: Tensor | None


def _reference(expected: Standard, formula: Loss, mode: Norm, parts: int) -> _Found:
    """In one process by autograd, with torch's own BatchNorm in the place of ours."""
    method = _method(expected, mode)
    for name, ours in list(method.named_modules()):
        if isinstance(ours, norm.BatchNorm):
            method.set_submodule(name, _torch_norm(ours))
    chunks = _batch(expected.samples).chunks(parts)
    z = join([method.embed(part.views) for part in chunks])
    t = join([method.target(part.views) for part in chunks])
    formula(method, z, t).backward()
    return _Found(_flat(method), _sorted(expected.remembered(method, z, t)) if expected.remembered else None)


class _TorchNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim in (2, 4)


def _torch_norm(ours: norm.BatchNorm) -> nn.BatchNorm2d:
    theirs = _TorchNorm(len(ours.weight)).double().train(ours.training)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.weight.requires_grad_(isinstance(ours.weight, nn.Parameter))
    theirs.bias.requires_grad_(ours.bias is not None)
    return theirs


class _Plain(Engine):
    """The engine's verbs without DeepSpeed, for parameters of any type."""

    def __init__(self, method: Method, chunks: int) -> None:
        self.method, self.options, self.device = (
            method,
            EngineOptions.model_validate({"chunks": chunks}),
            torch.device("cpu"),
        )

    def embed(self, views: Tensor) -> Tensors:
        return self.method.embed(views)

    def target(self, views: Tensor) -> Tensors:
        return self.method.target(views)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def _found(name: str, layouts: list[Layout], constructions: int) -> dict[tuple[Layout, Precision] | int, _Found]:
    """In each of the ranks, by layout and precision, and by construction."""
    expected = standard(name)
    mine = _batch(expected.samples).chunks(across.size())[across.rank()]
    got: dict[tuple[Layout, Precision] | int, _Found] = {}
    for layout in layouts:
        for precision, dtype in DTYPE.items():
            method = _method(expected, layout.norm).to(dtype)
            batch = Batch(mine.views.to(dtype), mine.index, mine.label)
            outcome = forward_backward(_Plain(method, layout.chunks), batch)
            gradient = across.mean(_flat(method))
            method.update(outcome.z, outcome.t, batch, 0.5)
            kept = _sorted(across.gather(expected.held(method))) if expected.held else None
            got[layout, precision] = _Found(gradient, kept)
    for k, construction in enumerate(expected.constructions[:constructions]):
        got[k] = _Found(_constructed(expected, construction, mine), None)
    return got


def _constructed(expected: Standard, construction: Construction, mine: Batch) -> Tensor:
    method = _method(expected, "fixed")
    construction.loss(method, method.embed(mine.views), method.target(mine.views)).backward()
    return across.mean(_flat(method))


def _sorted(rows: Tensor) -> Tensor:
    """By the first column: no two keys of a test agree in it."""
    return rows[rows[:, 0].argsort()]


def _flat(method: Method) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
