"""The parity table: compares gradients and memories on ranks x chunks with the paper's formula in one fp64 process."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from kilobatch.data.batch import HALF_WAY, Batch, Clock, make_batch
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks import batch_norm, keyed_layers
from kilobatch.methods.parity.lookup import standard
from kilobatch.methods.parity.standard import Arrange, Construction, Loss, Standard, by_method
from kilobatch.trainer.chunking import Chunking
from kilobatch.trainer.engine import Engine
from kilobatch.trainer.options import EngineOptions
from kilobatch.trainer.ranks import phase
from kilobatch.trainer.ranks.spawn import run_ranks
from kilobatch.trainer.step import forward_backward, join
from kilobatch.trainer.training_features import TrainingFeatures

Norm = Literal["fixed", "global", "local"]  # fixed: with the running statistics, so each sample is normalised alone
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
    wants = {parts_of: _reference(expected, expected.formula, *parts_of) for parts_of in map(_parts, layouts)}
    for layout in layouts:
        for precision in DTYPE:
            gradient, memory = got.layouts[layout, precision]
            want = wants[_parts(layout)]
            yield _row(name, layout, precision, gradient, want.gradient, right=True)
            if memory is not None and want.memory is not None:
                yield _row(f"{name}, what it remembers", layout, precision, memory, want.memory, right=True)
    for construction, gradient in zip(expected.constructions, got.constructions, strict=False):
        layout, want = (
            ParityLayout("fixed", ranks, 1),
            _reference(expected, construction.formula, "fixed", 1, construction.arrange),
        )
        yield _row(construction.name, layout, "fp64", gradient, want.gradient, right=construction.right)


def _row(name: str, layout: ParityLayout, precision: Precision, got: Tensor, want: Tensor, right: bool) -> ParityRow:
    got, want = got.double().flatten(), want.flatten()
    error = ((got - want).norm() / want.norm()).item()
    cosine = torch.cosine_similarity(got, want, dim=0).item()
    ratio = (got.norm() / want.norm()).item()
    return ParityRow(name, layout, precision, error, cosine, ratio, right)


def _parts(layout: ParityLayout) -> tuple[Norm, int]:
    """The norm, and the number of parts that it splits the global batch into; 1 unless it is local."""
    return layout.norm, layout.ranks * layout.chunks if layout.norm == "local" else 1


def _method(expected: Standard, mode: Norm) -> Method:
    """The method in fp64, with the same weights in every process."""
    torch.manual_seed(0)
    method = expected.build("global" if mode == "global" else "local").double()
    for module in batch_norm.norms(method):
        if isinstance(module.weight, nn.Parameter):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        module.train(mode != "fixed")
    return method


def _batch(expected: Standard) -> Batch:
    """The global batch."""
    generator, samples = torch.Generator().manual_seed(1), expected.samples
    shapes = [(samples, group.count, 3, group.size, group.size) for group in expected.groups]
    views = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return make_batch(views, label=expected.labels(samples), clock=HALF_WAY, fields=expected.fields(samples))


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
    _begin_epoch(PlainEngine(method, len(whole)), whole)
    batch = arrange(method, whole)
    chunks = batch.chunks(parts)
    z = join([_embed(method, part) for part in chunks])
    t = join([_target(method, part) for part in chunks])
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


def _begin_epoch(engine: Engine, whole: Batch) -> None:
    """Calls the method's hook before an epoch. whole: the global batch, whose samples are the training data here."""
    with torch.no_grad():
        engine.method.before_epoch(0, TrainingFeatures(engine, lambda size: _Block(whole), lambda: False))


class _Block:
    """This rank's block of a batch's samples, of each its first view."""

    def __init__(self, whole: Batch) -> None:
        self.samples, self._whole = len(whole), whole.replaced(views=tuple(x[:, :1] for x in whole.views[:1]))

    def __iter__(self) -> Iterator[Batch]:
        own = torch.arange(self.samples).tensor_split(collectives.world_size())[collectives.rank()]
        yield from map(self._whole.rows, own.split(5))


class PlainEngine(Engine):
    """The engine's embed, target and backward without DeepSpeed, for parameters of any type."""

    def __init__(self, method: Method, samples: int, **options: Any) -> None:
        """samples: of a rank; options: of EngineOptions."""
        self.method, self.options, self.device = method, EngineOptions(**options), torch.device("cpu")
        self.chunking = Chunking(self.options, method, samples, self.device, self.autocast)
        self.trained = [p for p in method.parameters() if p.requires_grad]
        self.loss_scale = 1.0

    def begin(self, clock: Clock) -> None:
        """Nothing begins: without an optimizer no group of parameters is late."""

    def embed(self, batch: Batch) -> Tensors:
        return _embed(self.method, batch)

    def target(self, batch: Batch) -> Tensors:
        return _target(self.method, batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def _embed(method: Method, batch: Batch) -> Tensors:
    with keyed_layers.drawing(method, batch.keys):
        return method.embed(batch)


def _target(method: Method, batch: Batch) -> Tensors:
    with keyed_layers.off(method):
        return method.target(batch)


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
    mine = _batch(expected).chunks(collectives.world_size())[collectives.rank()]
    results: dict[tuple[ParityLayout, Precision], _StepResult] = {}
    layouts = [layout for layout in LAYOUTS if layout.ranks == collectives.world_size()]
    constructions = expected.constructions if collectives.world_size() == RANKS[-1] else ()
    rows = len(layouts) * len(DTYPE) + len(constructions)
    for layout in layouts:
        for precision, dtype in DTYPE.items():
            method = _method(expected, layout.norm).to(dtype)
            batch = mine.to(dtype)
            engine = PlainEngine(method, len(batch), chunks=layout.chunks, keep=layout.kept)
            _begin_epoch(engine, _batch(expected).to(dtype))
            outcome = forward_backward(engine, batch)
            gradient = collectives.mean(_flat(method))
            method.update(outcome.z, outcome.t, outcome.batch)
            memory = _sorted(collectives.gather(expected.held(method))) if expected.held else None
            results[layout, precision] = _StepResult(gradient, memory)
            phase.phase(work, len(results), rows)  # from the first on, which takes longer than the others
    gradients: list[Tensor] = []
    for construction in constructions:
        gradients.append(_constructed(expected, construction, mine))
        phase.phase(work, len(results) + len(gradients), rows)
    return _Table(results, gradients)


def _constructed(expected: Standard, construction: Construction, mine: Batch) -> Tensor:
    method = _method(expected, "fixed")
    _begin_epoch(PlainEngine(method, len(mine)), _batch(expected))
    batch = construction.arrange(method, mine)
    construction.loss(method, _embed(method, batch), _target(method, batch), batch).backward()
    return collectives.mean(_flat(method))


def _sorted(rows: Tensor) -> Tensor:
    """Rows in the order of their first column, in which no two keys of a table agree."""
    return rows[rows[:, 0].argsort()]


def _flat(method: Method) -> Tensor:
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])
