"""Chooses how many chunks a rank's batch is computed in, and how many of them keep their graph, by the free memory."""

import socket
import zlib
from collections.abc import Callable

import torch

from kilobatch.data.batch import Batch
from kilobatch.data.errors import UserError, warn
from kilobatch.data.files import describe_bytes
from kilobatch.methods import collectives
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks import batch_norm, keyed_layers
from kilobatch.trainer import adversarial
from kilobatch.trainer.checkpoint.rng_state import random_state, set_random_state
from kilobatch.trainer.costs.memory_probe import Cost, cost, free_memory
from kilobatch.trainer.options import EngineOptions, chunks_problem

PROBE_SAMPLES = 2, 8  # two costs tell the part that grows with the samples from the part that does not
SHARE = 0.8  # of the memory that is free before the first step; the rest is for what the probes do not measure
UPDATE_COPIES = 4  # of the parameters: gradients, their flat copy for the all-reduce, two moments


class Chunking:
    """The number of chunks, and of chunks that keep their graph. The first step fixes both, alike on all ranks.

    A value of "auto" is chosen by running a few samples and measuring their memory. chunks "auto" is the fewest that
    fit, and 1 where a norm or the method needs the whole batch. A local norm sees one chunk at a time, so the number of
    chunks is part of the run: checkpoints hold `parts`, and resume() takes it over. keep changes nothing but speed, to
    the bit.

    Raises UserError for chunks that do not divide the batch, or that a norm over the global batch or the method rules
    out.
    """

    def __init__(
        self,
        options: EngineOptions,
        method: Method,
        batch_per_rank: int,
        device: torch.device,
        autocast: Callable[[], torch.autocast],
    ) -> None:
        self.chunks = None if options.chunks == "auto" else options.chunks
        self.keep = None if options.keep == "auto" else options.keep
        self.automatic, self._adversarial = self.chunks is None, options.adversarial is not None
        self._method, self._batch, self._device, self._autocast = method, batch_per_rank, device, autocast
        global_norm = batch_norm.requires_whole_batch(method)
        if self.chunks is None:
            self.chunks = 1 if global_norm or method.whole_batch else None
        elif batch_per_rank % self.chunks:
            raise UserError(
                f"engine.chunks is {self.chunks}, which does not divide the {batch_per_rank} samples of a rank"
            )
        elif problem := chunks_problem(self.chunks, global_norm, method.whole_batch):
            raise UserError(problem)

    @property
    def parts(self) -> int | None:
        """The chunks of all ranks, for a checkpoint; None where the recipe names chunks or none are chosen yet."""
        return self.chunks * collectives.world_size() if self.automatic and self.chunks else None

    def resume(self, parts: int) -> None:
        """Splits the global batch as the checkpoint's run did, if its `parts` divide over the ranks and samples."""
        if not self.automatic or self.chunks == 1:
            return
        chunks, rest = divmod(parts, collectives.world_size())
        if chunks and not rest and self._batch % chunks == 0:
            self.chunks = chunks
        elif collectives.rank() == 0:
            warn(
                f"the checkpoint's run computed a batch in {parts} parts, which do not divide over "
                f"{collectives.world_size()} ranks: engine.chunks is decided anew, and local norms see other parts"
            )

    def decide(self, batch: Batch) -> tuple[int, int]:
        """(chunks, how many of them keep their graph); measured at the first call, if at all.

        batch: this rank's, of the first step. Raises UserError, on every rank, where not even chunks of
        one sample fit.
        """
        if self.chunks == 1:
            return 1, 1
        if self.chunks is None or self.keep is None:
            self.chunks, self.keep = self._measure(batch)
        return self.chunks, min(self.keep, self.chunks)

    def _measure(self, batch: Batch) -> tuple[int, int]:
        if self._adversarial:
            batch = batch.with_fields(**{adversarial.PIXELS: batch.views[0][:, :1]})
        need = MemoryNeed.measure(self._method, batch, self._device, self._autocast)
        sharing = _ranks_on_this_machine(self._device)  # its all-gather also waits until the other ranks have measured
        budget = int(SHARE * free_memory(self._device, sharing))
        chunks = self.chunks
        if chunks is None:
            none_fits = len(batch) + 1
            divisors = (c for c in range(1, none_fits) if len(batch) % c == 0)
            fewest = next((c for c in divisors if need.of(len(batch) // c, 1) <= budget), none_fits)
            chunks = int(collectives.all_reduce_max(torch.tensor(fewest, device=self._device)))
            if chunks == none_fits:
                raise UserError(
                    "engine.chunks is auto, but not even one sample at a time fits: it needs "
                    f"{describe_bytes(need.of(1, 1))}, and {describe_bytes(budget)} may be used ({SHARE:.0%} of what "
                    "is free for a rank); use more workers on more machines, smaller images, or a smaller encoder"
                )
        samples = len(batch) // chunks
        keep = self.keep
        if keep is None:
            most = need.most_kept(samples, budget)
            keep = -int(collectives.all_reduce_max(torch.tensor(-min(most, chunks), device=self._device)))
        if collectives.rank() == 0:
            kept = min(keep, chunks)
            how = f"in {chunks} chunks of {samples}, {kept} of which keep their graph" if chunks > 1 else "at once"
            needed = f"needs {describe_bytes(need.of(samples, kept))} of {describe_bytes(budget)} free here"
            print(f"engine: a rank's {len(batch)} samples {how}; {needed}", flush=True)
        return chunks, keep


class MemoryNeed:
    """Bytes that a step in chunks takes, extrapolated from two small chunks: linear in the samples.

    rest: the loss and the update; the loss is counted as all ranks' embeddings and their gradients, twice.
    """

    def __init__(self, samples: tuple[int, int], costs: tuple[Cost, Cost], rest: int) -> None:
        self.rest = rest
        self._held = _line(samples, (costs[0].held, costs[1].held))
        self._peak = _line(samples, (costs[0].peak, costs[1].peak))

    @classmethod
    def measure(
        cls, method: Method, batch: Batch, device: torch.device, autocast: Callable[[], torch.autocast]
    ) -> "MemoryNeed":
        """Runs method.embed and its backward on the first samples.

        Leaves gradients, running statistics and random generators as they were.
        """
        parameters = [p for p in method.parameters() if p.requires_grad]
        outputs = 0

        def forward(samples: int) -> Tensors:
            with torch.enable_grad(), autocast():
                return adversarial.embed(method, batch.first(samples), embed)

        def embed(few: Batch) -> Tensors:
            with keyed_layers.drawing(method, few.keys):
                return method.embed(few)

        def backward(z: Tensors) -> None:
            nonlocal outputs
            outputs = sum(x.numel() * 4 for x in z.values())
            terms = [x.float().sum() for x in z.values() if x.requires_grad]
            if terms:  # else all of embed is frozen
                torch.autograd.grad(torch.stack(terms).sum(), parameters, allow_unused=True)

        samples = min(PROBE_SAMPLES[0], len(batch)), min(PROBE_SAMPLES[1], len(batch))
        before = random_state(device)
        with batch_norm.frozen(method):
            forward(samples[0])  # libraries allocate on first use
            few, many = (cost(lambda n=n: forward(n), backward, device) for n in samples)
        set_random_state(before, device)
        loss = 4 * collectives.world_size() * len(batch) * outputs // samples[1]
        return cls(samples, (few, many), loss + UPDATE_COPIES * sum(p.numel() * p.element_size() for p in parameters))

    def of(self, samples: int, keep: int) -> int:
        """The peak of a step in chunks of so many samples, `keep` of them with their graph.

        The last of these graphs is used by the first backward, and so is part of that chunk's own peak.
        """
        return self.rest + self._peak(samples) + max(0, keep - 1) * self._held(samples)

    def most_kept(self, samples: int, budget: int) -> int:
        """The most graphs that fit into the budget; 0: not even the one of the chunk that is computed."""
        return max(0, 1 + (budget - self.of(samples, 1)) // max(1, self._held(samples)))


def _line(x: tuple[int, int], y: tuple[int, int]) -> Callable[[int], int]:
    """The line through two points, or through one and the origin where both have one x; neither falls nor begins
    below zero."""
    slope = max(0, y[1] - y[0]) / (x[1] - x[0]) if x[1] > x[0] else y[1] / x[1]
    base = max(0.0, y[1] - slope * x[1])
    return lambda at: int(base + slope * at)


def _ranks_on_this_machine(device: torch.device) -> int:
    """How many ranks have this rank's host name, itself included."""
    mine = torch.tensor([zlib.crc32(socket.gethostname().encode())], device=device)
    return int((collectives.gather(mine) == mine).sum())
