"""Finds the parts of parameters that a rank updates under ZeRO stages 1 and 2, for LARS and for checkpoints.

ZeRO (Rajbhandari et al., 2020, arxiv.org/abs/1910.02054) puts each group's parameters end to end, pads them, and gives
every rank an equal piece, which may start and end in the middle of a parameter. The optimizer then holds one flat fp32
tensor of this rank for each group: updates by element are right on it, norms of parameters are not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from kilobatch.data.errors import UserError
from kilobatch.methods import collectives
from kilobatch.trainer.checkpoint.reader import Saved
from kilobatch.trainer.checkpoint.shard import Piece


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + numel) of a flattened parameter, which lie at [at, at + numel) of a flat tensor."""

    parameter: int  # index in the group
    start: int
    at: int
    numel: int

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.at, self.numel)


@dataclass(frozen=True)
class Partition:
    """The part of one parameter group that this rank updates. It may be empty where a small group has many ranks.

    flat: (n,) fp32, which the optimizer has as the group's only parameter; names, shapes: of all of the group's
    parameters.
    """

    flat: Tensor
    names: list[str]
    shapes: list[tuple[int, ...]]
    fragments: list[Fragment]

    @cached_property
    def parameters(self) -> Tensor:
        """(fragments,) int64: the index of each fragment's parameter."""
        return torch.tensor([f.parameter for f in self.fragments], dtype=torch.int64, device=self.flat.device)

    def of(self, flat: Tensor) -> list[Tensor]:
        """The fragments of a tensor that is laid out like `flat`, such as its gradient or momentum."""
        return [fragment.of(flat) for fragment in self.fragments]


def rank_partitions(zero: Any, names: Mapping[nn.Parameter, str]) -> list[Partition]:
    """The partition of each of the optimizer's groups. zero: a DeepSpeedZeroOptimizer; names: of all parameters.

    This reads the layout by which DeepSpeed flattens and unflattens parameters. The parameters' `_hp_mapping` would be
    easier to read, but is wrong with round_robin_gradients.
    """
    rank = collectives.rank()
    found = []
    for i, flat in enumerate(zero.single_partition_of_fp32_groups):
        members: list[nn.Parameter] = zero.round_robin_bit16_groups[i]
        first, last = rank * len(flat), (rank + 1) * len(flat)
        fragments = []
        for k, (p, offset) in enumerate(zip(members, zero.round_robin_bit16_offsets[i], strict=True)):
            start, end = max(offset, first), min(offset + p.numel(), last)
            if start < end:
                fragments.append(Fragment(k, start - offset, start - first, end - start))
        for f in fragments:
            expected = members[f.parameter].detach().reshape(-1)[f.start : f.start + f.numel]
            assert torch.equal(f.of(flat), expected), f"DeepSpeed keeps {names[members[f.parameter]]} elsewhere"
        found.append(Partition(flat, [names[p] for p in members], [tuple(p.shape) for p in members], fragments))
    return found


@torch.no_grad()
def refresh(zero: Any) -> None:
    """Copies the parameters, which are equal on all ranks, into this rank's fp32 masters. Needed after a restore."""
    for flat, parts in zip(zero.single_partition_of_fp32_groups, zero.parallel_partitioned_bit16_groups, strict=True):
        flat.copy_(parts[collectives.rank()])


def state_pieces(optimizer: Optimizer, parts: Sequence[Partition]) -> dict[str, Piece]:
    """The optimizer's state as pieces optimizer.KEY.NAME, named as by an optimizer that holds whole parameters.

    State with an element for each of a parameter's gives this rank's slice; a step count, which the parameters of a
    group have in common, is whole.
    """
    pieces = {}
    for part in parts:
        for key, value in optimizer.state.get(part.flat, {}).items():
            if not isinstance(value, Tensor):
                continue
            if value.dim() == 0:
                pieces |= {f"optimizer.{key}.{name}": Piece.of(value) for name in part.names}
                continue
            assert value.shape == part.flat.shape, f"{key} is {tuple(value.shape)}"
            for f in part.fragments:
                name, shape = part.names[f.parameter], part.shapes[f.parameter]
                pieces[f"optimizer.{key}.{name}"] = Piece(f.of(value.detach()), f.start, shape, sharded=True)
    return pieces


@torch.no_grad()
def restore_state(optimizer: Optimizer, parts: Sequence[Partition], saved: Saved) -> None:
    """Loads the state saved by state_pieces or by an optimizer with whole parameters; reads this rank's slices only.

    Raises UserError where a group's parameters had different step counts, which one flat tensor cannot have, or where
    some had a state and others none.
    """
    stored = set(saved.names())
    keys = {name.split(".", 2)[1] for name in stored if name.startswith("optimizer.")}
    for part in parts:
        state: dict[str, Tensor] = {}
        for key in sorted(keys):
            lacking = [name for name in part.names if f"optimizer.{key}.{name}" not in stored]
            if len(lacking) == len(part.names):
                continue
            if lacking:
                raise UserError(
                    f"the checkpoint has no optimizer state {key} of {lacking[0]}; resume with engine.zero=0"
                )
            if all(saved.shape(f"optimizer.{key}.{name}") == () for name in part.names) and key == "step":
                steps = [saved.whole(f"optimizer.{key}.{name}") for name in part.names]
                if any(step != steps[0] for step in steps):
                    raise UserError(
                        "the checkpoint's parameters were updated different numbers of times, which ZeRO cannot go on "
                        "with; resume with engine.zero=0"
                    )
                state[key] = steps[0]
                continue
            state[key] = torch.zeros_like(part.flat)
            for f in part.fragments:
                f.of(state[key]).copy_(saved.read(f"optimizer.{key}.{part.names[f.parameter]}", f.start, f.numel))
        if state:
            optimizer.state[part.flat] = state
