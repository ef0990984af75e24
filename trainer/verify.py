"""The parity table: the gradients of any ranks x chunks against the paper's formula in one process, in fp64."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from data.batch import Batch
from methods import across, norm
from methods.convnet import ConvNet
from methods.method import Method, Tensors
from methods.simclr import SimCLR
from methods.verify import TEMPERATURE, Construction, Pairing, standard
from trainer.engine import Engine, EngineOptions
from trainer.ranks import run_ranks
from trainer.step import forward_backward

Norm = Literal["fixed", "global", "local"]  # fixed: by the running statistics, so that samples do not meet in it
Precision = Literal["fp64", "fp32"]
LIMIT: dict[Precision, float] = {"fp64": 1e-12, "fp32": 1e-5}
DTYPE: dict[Precision, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32}
SAMPLES, SIDE = 16, 12


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
    """One comparison with the formula's gradient. error: |got - want| / |want| over all parameters."""

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
    wants = {parts_of: _reference(expected.formula, *parts_of) for parts_of in {_parts(x) for x in LAYOUTS}}
    for ranks in (1, 2, 4):
        layouts = [layout for layout in LAYOUTS if layout.ranks == ranks]
        constructions = expected.constructions if ranks == 4 else ()
        asked = name, layouts, len(constructions)
        # Rank 0 speaks for all: after averaging, every rank holds the same gradients.
        got = _gradients(*asked) if ranks == 1 else run_ranks(ranks, _gradients, *asked)[0]
        for layout in layouts:
            for precision in DTYPE:
                yield _row(name, layout, precision, got[layout, precision], wants[_parts(layout)], right=True)
        for k, construction in enumerate(constructions):
            layout = Layout("fixed", ranks, 1)
            want = _reference(construction.formula, "fixed", 1)
            yield _row(construction.name, layout, "fp64", got[k], want, right=construction.right)


def _row(name: str, layout: Layout, precision: Precision, got: Tensor, want: Tensor, right: bool) -> Row:
    got = got.double()
    error = ((got - want).norm() / want.norm()).item()
    cosine = torch.cosine_similarity(got, want, dim=0).item()
    ratio = (got.norm() / want.norm()).item()
    return Row(name, layout.norm, layout.ranks, layout.chunks, precision, error, cosine, ratio, right)


def _parts(layout: Layout) -> tuple[Norm, int]:
    """What the formula is computed with: in how many parts a local norm sees the batch."""
    return layout.norm, layout.ranks * layout.chunks if layout.norm == "local" else 1


def _method(mode: Norm) -> Method:
    """The same weights in every process; fp64."""
    torch.manual_seed(0)
    method = SimCLR(ConvNet(4, "local" if mode == "local" else "global"), temperature=TEMPERATURE, dim=8).double()
    for module in norm.norms(method):
        nn.init.uniform_(module.weight, 0.5, 1.5)
        module.train(mode != "fixed")
    return method


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(SAMPLES, 2, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return Batch(views, torch.arange(SAMPLES), torch.zeros(SAMPLES, dtype=torch.int64))


def _reference(formula: Pairing, mode: Norm, parts: int) -> Tensor:
    """In one process by autograd, with torch's own BatchNorm in the place of ours."""
    method = _method(mode)
    for name, ours in list(method.named_modules()):
        if isinstance(ours, norm.BatchNorm):
            method.set_submodule(name, _torch_norm(ours))
    z = torch.cat([method.embed(part.views)["z"] for part in _batch().chunks(parts)])
    formula(z[:, 0], z[:, 1]).backward()
    return _flat(method)


class _TorchNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim in (2, 4)


def _torch_norm(ours: norm.BatchNorm) -> nn.BatchNorm2d:
    theirs = _TorchNorm(len(ours.weight)).double().train(ours.training)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    if ours.bias is None:
        theirs.bias.requires_grad_(False)
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


def _gradients(name: str, layouts: list[Layout], constructions: int) -> dict[tuple[Layout, Precision] | int, Tensor]:
    """In each of the ranks: averaged gradients by layout and precision, and by construction."""
    mine = Batch(*(x.chunk(across.size())[across.rank()] for x in (_batch().views, _batch().index, _batch().label)))
    got: dict[tuple[Layout, Precision] | int, Tensor] = {}
    for layout in layouts:
        for precision, dtype in DTYPE.items():
            method = _method(layout.norm).to(dtype)
            batch = Batch(mine.views.to(dtype), mine.index, mine.label)
            forward_backward(_Plain(method, layout.chunks), batch)
            got[layout, precision] = across.mean(_flat(method))
    for k, construction in enumerate(standard(name).constructions[:constructions]):
        got[k] = _constructed(construction, mine)
    return got


def _constructed(construction: Construction, mine: Batch) -> Tensor:
    method = _method("fixed")
    z = method.embed(mine.views)["z"]
    construction.loss(z[:, 0], z[:, 1]).backward()
    return across.mean(_flat(method))


def _flat(method: Method) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
