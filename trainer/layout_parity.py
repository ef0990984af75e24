"""Comparison of a method on ranks x chunks with itself in one process: for methods without a formula, and encoders.

It finds out what depends on the number of ranks or chunks. A wrong equation is as wrong in one process, so a method of
this project has a formula besides (trainer/parity.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import DataFacts, Method
from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.build import build_encoder
from kilobatch.methods.networks.options import EncoderOptions
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.methods.parity.standard import GroupShape
from kilobatch.methods.source_file import load_source
from kilobatch.trainer.parity import DTYPE, LAYOUTS, RANKS, ParityLayout, ParityRow, Precision, parity_row, parts_of
from kilobatch.trainer.plain_step import Norm, PlainEngine, begin_epoch, random_batch, set_norms
from kilobatch.trainer.ranks import phase
from kilobatch.trainer.ranks.spawn import run_ranks
from kilobatch.trainer.step import forward_backward

CLASSES = 3  # of the labels that samples have here
KEPT = ", what it keeps"


@dataclass(frozen=True)
class Subject:
    """What is compared. method: FILE.py:Class, None: SimCLR; arguments: of its constructor; encoder: its norm does not
    count; views: of each sample; side: pixels of an image; samples: of the global batch."""

    name: str
    method: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    encoder: EncoderOptions = field(default_factory=lambda: EncoderOptions(name="convnet", width=4))
    views: int = 2
    side: int = 12
    samples: int = 24


def layout_rows(
    subject: Subject,
    tell: Callable[[str], None] | None = None,
    *,
    ranks: Sequence[int] = RANKS,
    precisions: Sequence[Precision] = ("fp64", "fp32"),
) -> list[ParityRow]:
    """The rows of all layouts that the subject can have: its gradients, and its buffers after the step, on real process
    groups against one process in fp64. A local norm sees as many parts there.

    tell: as for parity_tables. Raises UserError where the method or the encoder does.
    """
    references: dict[tuple[Norm, int], _Outcome] = {}
    whole = _batch(subject)
    rows: list[ParityRow] = []
    for world in ranks:
        work = (subject, tuple(precisions), tell)
        results = _results(*work) if world == 1 else run_ranks(world, _results, *work, timeout=1800.0)[0]
        for (layout, precision), got in results.items():
            parts = parts_of(layout)
            if parts not in references:
                references[parts] = _run(subject, ParityLayout(layout.norm, 1, parts[1]), "fp64", whole, whole)
            want = references[parts]
            rows.append(parity_row(subject.name, layout, precision, got[0], want[0]))
            if want[1].numel():
                rows.append(parity_row(f"{subject.name}{KEPT}", layout, precision, got[1], want[1]))
    return rows


_Outcome = tuple[Tensor, Tensor]  # the gradients of all parameters, averaged over ranks; the buffers after the step


def _results(
    subject: Subject, precisions: Sequence[Precision], tell: Callable[[str], None] | None
) -> dict[tuple[ParityLayout, Precision], _Outcome]:
    """The results of each layout on this number of ranks. Runs in every rank."""
    world = collectives.world_size()
    probe = _method(subject, "fixed")
    norms = ["fixed", "global", "local"] if batch_norm.norms(probe) else ["fixed"]
    layouts = [
        layout
        for layout in LAYOUTS
        if layout.ranks == world and layout.norm in norms and (layout.chunks == 1 or not probe.whole_batch)
    ]
    whole = _batch(subject)
    mine = whole.chunks(world)[collectives.rank()]
    found: dict[tuple[ParityLayout, Precision], _Outcome] = {}
    work = f"rows of {subject.name} on {world} {'rank' if world == 1 else 'ranks'}"
    with phase.shown_with(tell if collectives.rank() == 0 else None, every=phase.FIRST):
        phase.announce(work)
        for layout in layouts:
            for precision in precisions:
                found[layout, precision] = _run(subject, layout, precision, whole, mine)
                phase.phase(work, len(found), len(layouts) * len(precisions))
    return found


def _run(subject: Subject, layout: ParityLayout, precision: Precision, whole: Batch, mine: Batch) -> _Outcome:
    """A step on this rank's part of the batch, after the hook before an epoch."""
    method, batch = _method(subject, layout.norm).to(DTYPE[precision]), mine.to(DTYPE[precision])
    begin_epoch(method, whole.to(DTYPE[precision]))
    step = forward_backward(PlainEngine(method, len(batch), chunks=layout.chunks, keep=layout.kept), batch)
    gradients = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
    batch_norm.commit(method)
    method.update(step.z, step.t, step.batch)
    own = method.own_buffers  # which differ by rank, and are no rank's to compare
    buffers = [
        x.double().flatten()
        for name, x in method.named_buffers()
        if x.is_floating_point() and name in method.state_dict() and name not in own
    ]
    return collectives.mean(torch.cat(gradients)), torch.cat(buffers) if buffers else torch.zeros(0)


def _method(subject: Subject, norm: Norm) -> Method:
    """The method in fp64, with the same weights in every process."""
    torch.manual_seed(0)
    encoder = build_encoder(
        subject.encoder.model_copy(update={"norm": "global" if norm == "global" else "local"}), [subject.side]
    )
    cls = SimCLR if subject.method is None else load_source(subject.method)
    method: Method = cls(encoder, **subject.arguments)
    counts = [subject.samples // CLASSES + (k < subject.samples % CLASSES) for k in range(CLASSES)]
    method.prepare(DataFacts(subject.samples, CLASSES, tuple(counts)))
    for p in method.parameters():
        # New layers often begin as the identity, by a factor of 0 or 1e-6, and would hide what they do.
        if p.numel() == max(p.shape) and p.abs().max() < 1e-3:
            nn.init.uniform_(p, 0.1, 0.2)
    set_norms(method, norm)
    return method.double()


def _batch(subject: Subject) -> Batch:
    """The global batch."""
    label = torch.arange(subject.samples) % CLASSES
    return random_batch(subject.samples, [GroupShape(subject.views, subject.side)], label)
