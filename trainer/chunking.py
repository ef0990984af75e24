"""In how many chunks a rank's batch is computed and how many keep their graph: as asked, or as memory allows."""

import socket
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from kilobatch.data.errors import Refusal
from kilobatch.methods import collectives as across
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks import batch_norm as norm
from kilobatch.trainer.checkpoint.rng_state import random_state, set_random_state
from kilobatch.trainer.costs.memory_probe import Cost, cost, free
from kilobatch.trainer.options import EngineOptions

PROBES = 2, 8  # samples: from two costs follow the one that does not grow with the samples, and the one that does
SHARE = 0.8  # of the memory that is free before the first step; the rest is for what no probe sees
UPDATE = 4  # times the parameters: gradients, their flat copy for the all-reduce, two moments


class Chunking:
    """chunks and keep, both decided by the first step: an "auto" by a probe of a few samples, alike on all ranks.

    chunks "auto" is the fewest that fit, 1 where a norm or the method needs the whole batch. A local norm sees a chunk,
    so their number is part of the run: checkpoints keep `parts`, and pin() takes them up. keep changes nothing but
    speed, to the bit.

    Raises Refusal for chunks that do not divide the batch, or that a norm over the global batch or the method rules
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
        self.measured = self.chunks is None
        self._method, self._batch, self._device, self._autocast = method, batch_per_rank, device, autocast
        whole = _needs_whole_batch(method)
        if self.chunks is None:
            self.chunks = 1 if whole else None
        elif batch_per_rank % self.chunks:
            raise Refusal(
                f"engine.chunks is {self.chunks}, which does not divide the {batch_per_rank} samples of a rank"
            )
        elif self.chunks > 1 and whole:
            raise Refusal(f"engine.chunks is {self.chunks}, but {whole}")

    @property
    def parts(self) -> int | None:
        """Of the global batch, for a checkpoint; None: the recipe says it, or nothing is decided yet."""
        return self.chunks * across.size() if self.measured and self.chunks else None

    def pin(self, parts: int) -> None:
        """Computes the global batch in as many parts as a checkpoint's run did, where these divide over the ranks."""
        if not self.measured or self.chunks == 1:
            return
        chunks, rest = divmod(parts, across.size())
        if chunks and not rest and self._batch % chunks == 0:
            self.chunks = chunks
        elif across.rank() == 0:
            print(
                f"kilobatch: warning: the checkpoint's run computed a batch in {parts} parts, which do not divide over "
                f"{across.size()} ranks: engine.chunks is decided anew, and local norms see other parts",
                flush=True,
            )

    def decided(self, views: Tensor) -> tuple[int, int]:
        """(chunks, how many of them keep their graph). views (N, V, 3, H, W): this rank's, of the first step.

        Raises Refusal, on every rank, where not even chunks of one sample fit.
        """
        if self.chunks == 1:
            return 1, 1
        if self.chunks is None or self.keep is None:
            self.chunks, self.keep = self._decide(views)
        return self.chunks, min(self.keep, self.chunks)

    def _decide(self, views: Tensor) -> tuple[int, int]:
        need = Need.measure(self._method, views, self._device, self._autocast)
        sharing = _on_this_machine(self._device)  # also waits for the others' probes to be over
        room = int(SHARE * free(self._device, sharing))
        chunks = self.chunks
        if chunks is None:
            none = len(views) + 1
            equal = (c for c in range(1, none) if len(views) % c == 0)
            fits = next((c for c in equal if need.of(len(views) // c, 1) <= room), none)
            chunks = int(across.all_max(torch.tensor(fits, device=self._device)))
            if chunks == none:
                raise Refusal(
                    f"engine.chunks is auto, but not even one sample at a time fits: it needs {_gib(need.of(1, 1))}, "
                    f"and {_gib(room)} may be used ({SHARE:.0%} of what is free for a rank); use more workers on more "
                    "machines, smaller images, or a smaller encoder"
                )
        samples = len(views) // chunks
        keep = self.keep
        if keep is None:
            most = need.keeping(samples, room)
            keep = -int(across.all_max(torch.tensor(-min(most, chunks), device=self._device)))
        if across.rank() == 0:
            kept = min(keep, chunks)
            what = f"in {chunks} chunks of {samples}, {kept} of which keep their graph" if chunks > 1 else "at once"
            size = _gib(need.of(samples, kept))
            print(f"engine: a rank's {len(views)} samples {what}; needs {size} of {_gib(room)} free here", flush=True)
        return chunks, keep


class Need:
    """Bytes of a step in chunks, from the cost of two small chunks: linear in the samples.

    rest: the loss and the update; the loss is put at all ranks' embeddings and their gradients twice over.
    """

    def __init__(self, samples: tuple[int, int], costs: tuple[Cost, Cost], rest: int) -> None:
        self.rest = rest
        self._held = _line(samples, (costs[0].held, costs[1].held))
        self._peak = _line(samples, (costs[0].peak, costs[1].peak))

    @classmethod
    def measure(
        cls, method: Method, views: Tensor, device: torch.device, autocast: Callable[[], torch.autocast]
    ) -> "Need":
        """Runs method.embed forth and back on the first samples; changes nothing: no gradient, statistic or draw."""
        parameters = [p for p in method.parameters() if p.requires_grad]
        outputs = 0

        def forward(samples: int) -> Tensors:
            with torch.enable_grad(), autocast():
                return method.embed(views[:samples])

        def backward(z: Tensors) -> None:
            nonlocal outputs
            outputs = sum(x.numel() * 4 for x in z.values())
            scalar = torch.stack([x.float().sum() for x in z.values() if x.requires_grad]).sum()
            torch.autograd.grad(scalar, parameters, allow_unused=True)

        samples = min(PROBES[0], len(views)), min(PROBES[1], len(views))
        before = random_state(device)
        with norm.frozen(method):
            forward(samples[0])  # libraries allocate on first use
            few, many = (cost(lambda n=n: forward(n), backward, device) for n in samples)
        set_random_state(before, device)
        loss = 4 * across.size() * len(views) * outputs // samples[1]
        return cls(samples, (few, many), loss + UPDATE * sum(p.numel() * p.element_size() for p in parameters))

    def of(self, samples: int, keep: int) -> int:
        """At the peak of a step in chunks of so many samples, with `keep` graphs: of these the last goes back first."""
        return self.rest + self._peak(samples) + max(0, keep - 1) * self._held(samples)

    def keeping(self, samples: int, room: int) -> int:
        """How many graphs fit; 0: not even the one that goes forth and back."""
        return max(0, 1 + (room - self.of(samples, 1)) // max(1, self._held(samples)))


def _line(x: tuple[int, int], y: tuple[int, int]) -> Callable[[int], int]:
    """Through two points, and through zero where there is but one; nowhere below zero, nor falling."""
    slope = max(0, y[1] - y[0]) / (x[1] - x[0]) if x[1] > x[0] else y[1] / x[1]
    base = max(0.0, y[1] - slope * x[1])
    return lambda at: int(base + slope * at)


def _needs_whole_batch(method: Method) -> str:
    """Why the batch cannot be computed in chunks, and the way out; "": it can."""
    if norm.requires_whole_batch(method):
        return (
            "the BatchNorm is 'global': its statistics need the whole batch at once; use engine.chunks=1 or "
            "encoder.norm=local"
        )
    return f"{method.whole_batch}; use engine.chunks=1" if method.whole_batch else ""


def _on_this_machine(device: torch.device) -> int:
    """Ranks with this one's host name, itself among them."""
    me = torch.tensor([zlib.crc32(socket.gethostname().encode())], device=device)
    return int((across.gather(me) == me).sum())


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
