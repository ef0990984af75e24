"""The parity table: compares gradients and memories on ranks x chunks with the paper's formula in one fp64 process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.parity.lookup import standard
from kilobatch.methods.parity.standard import Arrange, Construction, Loss, Standard, by_method
from kilobatch.trainer.plain_step import (
    Norm,
    PlainEngine,
    begin_epoch,
    plain_embed,
    plain_target,
    random_batch,
    set_norms,
)
from kilobatch.trainer.ranks import phase
from kilobatch.trainer.ranks.spawn import run_ranks
from kilobatch.trainer.step import forward_backward, join

Precision = Literal["fp64", "fp32"]
LIMIT: dict[Precision, float] = {"fp64": 1e-12, "fp32": 1e-5}
DTYPE: dict[Precision, torch.dtype] = {"fp64": torch.float64, "fp32": torch.float32}
RANKS = 1, 2, 3, 4


@dataclass(frozen=True)
class ParityLayout:
    """Ranks and chunks of one comparison. kept: chunks that keep their graph."""

    norm: Norm
    ranks: int
    chunks: int
    kept: int = 0


LAYOUTS = (
    *(
        ParityLayout("fixed", ranks, chunks)
        for ranks, chunks in ((1, 1), (1, 4), (2, 1), (2, 2), (3, 1), (3, 2), (4, 1))
    ),
    ParityLayout("fixed", 1, 4, 2),
    ParityLayout("fixed", 2, 2, 1),
    *(ParityLayout("global", ranks, 1) for ranks in RANKS),
    *(ParityLayout("local", ranks, chunks) for ranks, chunks in ((1, 4), (2, 2), (3, 2), (4, 1))),
    ParityLayout("local", 1, 4, 2),
    ParityLayout("local", 2, 2, 1),
)


@dataclass(frozen=True)
class ParityRow:
    """One comparison with the formula. error: |got - want| / |want| over all parameters' gradients, or all keys."""

    name: str
    layout: ParityLayout
    precision: Precision
    error: float
    cosine: float
    norm_ratio: float
    right: bool  # False: a wrong construction, which the check must find to differ

    @property
    def agrees(self) -> bool:
        return self.error <= LIMIT[self.precision]

    @property
    def ok(self) -> bool:
        """A right construction agrees with the formula, a wrong one does not."""
        return self.agrees == self.right


def parity_tables(*names: str, tell: Callable[[str], None] | None = None) -> dict[str, list[ParityRow]]:
    """The parity table of each method, on real process groups, followed by right and wrong constructions of its loss.

    All methods share the groups, because starting one takes longer than checking a method in it. tell: a function at
    the top level of a module, which rank 0 calls with a line before each method and, while that goes on, with the rows
    that are done. Raises UserError for a method without
    a table.
    """
    rows: dict[str, list[ParityRow]] = {name: [] for name in names}
    standards = {name: standard(name) for name in names}
    for ranks in RANKS:
        # Rank 0's result is enough: averaged gradients are the same on every rank, and memories are gathered.
        tables = _tables(names, tell) if ranks == 1 else run_ranks(ranks, _tables, names, tell, timeout=900.0)[0]
        for name, expected in standards.items():
            rows[name] += _rows(name, expected, ranks, tables[name])
    return rows


def _rows(name: str, expected: Standard, ranks: int, got: "_Table") -> Iterator[ParityRow]:
    layouts = [layout for layout in LAYOUTS if layout.ranks == ranks]
    wants = {parts: _reference(expected, expected.formula, *parts) for parts in map(parts_of, layouts)}
    for layout in layouts:
        for precision in DTYPE:
            gradient, memory = got.layouts[layout, precision]
            want = wants[parts_of(layout)]
            yield parity_row(name, layout, precision, gradient, want.gradient, right=True)
            if memory is not None and want.memory is not None:
                yield parity_row(f"{name}, what it remembers", layout, precision, memory, want.memory, right=True)
    for construction, gradient in zip(expected.constructions, got.constructions, strict=False):
        layout = ParityLayout("fixed", ranks, 1)
        want = _reference(expected, construction.formula, "fixed", 1, construction.arrange)
        yield parity_row(construction.name, layout, "fp64", gradient, want.gradient, right=construction.right)


def parity_row(
    name: str, layout: ParityLayout, precision: Precision, got: Tensor, want: Tensor, right: bool = True
) -> ParityRow:
    """The row of a comparison. got, want: tensors with as many elements, the second in fp64."""
    got, want = got.double().flatten(), want.flatten()
    error = ((got - want).norm() / want.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()
    cosine = torch.cosine_similarity(got, want, dim=0).item()
    ratio = (got.norm() / want.norm()).item()
    return ParityRow(name, layout, precision, error, cosine, ratio, right)


def parts_of(layout: ParityLayout) -> tuple[Norm, int]:
    """The norm, and the number of parts that it splits the global batch into; 1 unless it is local."""
    return layout.norm, layout.ranks * layout.chunks if layout.norm == "local" else 1


def _method(expected: Standard, mode: Norm) -> Method:
    """The method in fp64, with the same weights in every process."""
    torch.manual_seed(0)
    method = expected.build("global" if mode == "global" else "local").double()
    set_norms(method, mode)
    return method


def _batch(expected: Standard) -> Batch:
    """The global batch."""
    labels, fields = expected.labels(expected.samples), expected.fields(expected.samples)
    return random_batch(expected.samples, expected.groups, labels, fields)


class _StepResult(NamedTuple):
    """gradient: of all parameters, averaged over ranks; memory (m, D): the keys that all ranks hold, sorted."""

    gradient: Tensor
    memory: Tensor | None


def _reference(expected: Standard, formula: Loss, mode: Norm, parts: int, arrange: Arrange = by_method) -> _StepResult:
    """The formula in one process by autograd, with torch's own BatchNorm in place of this project's."""
    method = _method(expected, mode)
    for name, ours in list(method.named_modules()):
        if isinstance(ours, batch_norm.BatchNorm):
            method.set_submodule(name, _torch_norm(ours))
    whole = _batch(expected)
    begin_epoch(method, whole)
    batch = arrange(method, whole)
    chunks = batch.chunks(parts)
    z = join([plain_embed(method, part) for part in chunks])
    t = join([plain_target(method, part) for part in chunks])
    formula(method, z, t, batch).backward()
    return _StepResult(
        _flat(method), _sorted(expected.remembered(method, z, t, batch)) if expected.remembered else None
    )


class _TorchNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim in (2, 4)


def _torch_norm(ours: batch_norm.BatchNorm) -> nn.BatchNorm2d:
    theirs = _TorchNorm(len(ours.weight)).double().train(ours.training)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.weight.requires_grad_(isinstance(ours.weight, nn.Parameter))
    theirs.bias.requires_grad_(ours.bias is not None)
    return theirs


class _Table(NamedTuple):
    """Results of one method on one number of ranks. constructions: their gradients, on the largest number of ranks."""

    layouts: dict[tuple[ParityLayout, Precision], _StepResult]
    constructions: list[Tensor]


def _tables(names: Sequence[str], tell: Callable[[str], None] | None) -> dict[str, _Table]:
    """The results of each method. Runs in every rank."""
    tables: dict[str, _Table] = {}
    ranks = collectives.world_size()
    with phase.shown_with(tell if collectives.rank() == 0 else None, every=phase.FIRST):
        for name in names:
            work = f"{name} on {ranks} {'rank' if ranks == 1 else 'ranks'}"
            phase.announce(work)
            tables[name] = _table(standard(name), f"rows of {work}")
    return tables


def _table(expected: Standard, work: str) -> _Table:
    """work: what is made, in words for those who wait."""
    whole = _batch(expected)
    mine = _own(whole)
    results: dict[tuple[ParityLayout, Precision], _StepResult] = {}
    layouts = [layout for layout in LAYOUTS if layout.ranks == collectives.world_size()]
    constructions = expected.constructions if collectives.world_size() == RANKS[-1] else ()
    rows = len(layouts) * len(DTYPE) + len(constructions)
    for layout in layouts:
        for precision, dtype in DTYPE.items():
            method = _method(expected, layout.norm).to(dtype)
            begin_epoch(method, whole.to(dtype))
            engine = PlainEngine(method, len(mine), chunks=layout.chunks, keep=layout.kept)
            outcome = forward_backward(engine, mine.to(dtype))
            gradient = collectives.mean(_flat(method))
            method.update(outcome.z, outcome.t, outcome.batch)
            memory = _sorted(collectives.gather(expected.held(method))) if expected.held else None
            results[layout, precision] = _StepResult(gradient, memory)
            phase.phase(work, len(results), rows)  # from the first on, which takes longer than the others
    gradients: list[Tensor] = []
    for construction in constructions:
        gradients.append(_constructed(expected, construction, whole))
        phase.phase(work, len(results) + len(gradients), rows)
    return _Table(results, gradients)


def _constructed(expected: Standard, construction: Construction, whole: Batch) -> Tensor:
    method = _method(expected, "fixed")
    begin_epoch(method, whole)
    batch = construction.arrange(method, _own(whole))
    construction.loss(method, plain_embed(method, batch), plain_target(method, batch), batch).backward()
    return collectives.mean(_flat(method))


def _own(whole: Batch) -> Batch:
    """This rank's part of the global batch."""
    return whole.chunks(collectives.world_size())[collectives.rank()]


def _sorted(rows: Tensor) -> Tensor:
    """Rows in the order of their first column, in which no two keys of a table agree."""
    return rows[rows[:, 0].argsort()]


def _flat(method: Method) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
