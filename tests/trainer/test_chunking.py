"""The choice of chunks and kept graphs: memory predicted by a probe, against the memory of a step."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kilobatch.data.batch import Batch, make_batch
from kilobatch.data.errors import UserError
from kilobatch.methods.method import Method, Tensors
from kilobatch.methods.networks.convnet import ConvNet
from kilobatch.methods.networks.options import Mode
from kilobatch.methods.papers.simclr import SimCLR
from kilobatch.trainer import chunking
from kilobatch.trainer.chunking import SHARE, MemoryNeed
from kilobatch.trainer.costs import memory_probe
from kilobatch.trainer.costs.memory_probe import cost
from kilobatch.trainer.plain_step import PlainEngine
from kilobatch.trainer.step import forward_backward

CPU = torch.device("cpu")
SAMPLES = 64


class Wide(Method):
    """Two layers whose graph can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(48, 100, bias=False), nn.Tanh(), nn.Linear(100, 10, bias=False))

    def embed(self, batch: Batch) -> Tensors:
        return {"z": self.encoder(batch.views[0].flatten(2))}

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        first, second = z["z"].unbind(1)
        return F.mse_loss(first, second)


def batch() -> Batch:
    views = torch.randn(SAMPLES, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return make_batch(views, torch.arange(SAMPLES), torch.zeros(SAMPLES, dtype=torch.int64))


def simclr(norm: Mode = "local") -> SimCLR:
    torch.manual_seed(0)
    return SimCLR(ConvNet(8, norm), temperature=0.2)


def engine(method: Method, **options: int | str) -> PlainEngine:
    return PlainEngine(method, SAMPLES, **options)


def need_of(method: Method) -> MemoryNeed:
    return MemoryNeed.measure(method, batch(), CPU, engine(method).autocast)


@pytest.fixture
def set_free_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that sets the bytes that a step may take."""
    return lambda size: monkeypatch.setattr(chunking, "free_memory", lambda device, sharing: int(size / SHARE) + 1)


def test_the_bytes_of_a_graph_are_those_counted_by_hand() -> None:
    method, of = Wide(), make_batch(torch.randn(8, 2, 3, 4, 4))
    weights = list(method.parameters())
    measured = cost(lambda: method.embed(of)["z"], lambda z: torch.autograd.grad(z.sum(), weights), CPU)
    assert measured.held == 16 * (100 + 10) * 4  # the tanh's output is saved, its input is dropped; the output
    assert measured.held < measured.peak < measured.held + (16 * 210 + sum(p.numel() for p in weights)) * 4 + 64


@pytest.mark.parametrize(("chunks", "keep"), [(1, 1), (2, 1), (8, 0), (8, 1), (8, 4), (8, 8)])
def test_a_step_takes_the_predicted_memory(chunks: int, keep: int) -> None:
    """From probes of 2 and 8 samples. MemoryNeed.of counts the update, which this test does not make."""
    method, whole = simclr(), batch()
    need, plain = need_of(method), engine(method, chunks=chunks, keep=keep)
    rest, loss = need.rest, 4 * SAMPLES * 2 * 128 * 4
    peak = cost(lambda: None, lambda _: forward_backward(plain, whole), CPU).peak
    assert need.of(SAMPLES // chunks, keep) - rest + loss == pytest.approx(peak, rel=0.1)


def test_the_fewest_chunks_that_fit_and_the_most_graphs(set_free_memory: Callable[[int], None]) -> None:
    need = need_of(simclr())
    for size, expected in (
        (need.of(SAMPLES, 1), (1, 1)),
        (need.of(SAMPLES, 1) - 1024, (2, 1)),
        (need.of(SAMPLES // 2, 1), (2, 1)),
        (need.of(SAMPLES // 2, 1) - 1024, (4, 1)),
        (need.of(1, 1), (SAMPLES, 1)),
    ):
        set_free_memory(size)
        assert engine(simclr(), chunks="auto").chunking.decide(batch()) == expected
    for size, kept in ((need.of(8, 3), 3), (need.of(8, 3) - 1024, 2), (2**40, 8), (0, 0)):
        set_free_memory(size)
        assert engine(simclr(), chunks=8).chunking.decide(batch()) == (
            8,
            kept,
        )  # chunks as in the options, whether they fit or not
    set_free_memory(need.of(1, 1) - 1024)
    with pytest.raises(UserError, match="not even one sample at a time fits"):
        engine(simclr(), chunks="auto").chunking.decide(batch())


def test_a_norm_over_the_global_batch_makes_auto_one_chunk(set_free_memory: Callable[[int], None]) -> None:
    set_free_memory(0)
    whole = engine(simclr("global"), chunks="auto")
    assert whole.chunking.decide(batch()) == (1, 1)
    whole.chunking.resume(4)  # as of 4 ranks
    assert whole.chunking.decide(batch()) == (1, 1)


def test_another_number_of_ranks_keeps_the_parts_of_the_batch(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for ranks, parts, expected in ((1, 8, 8), (2, 8, 4), (4, 8, 2)):
        monkeypatch.setattr("kilobatch.methods.collectives.world_size", lambda ranks=ranks: ranks)
        resumed = engine(simclr(), chunks="auto")
        resumed.chunking.resume(parts)
        assert (resumed.chunking.chunks, resumed.chunking.parts) == (expected, parts)
    assert not capsys.readouterr().err
    monkeypatch.setattr("kilobatch.methods.collectives.world_size", lambda: 3)
    resumed = engine(simclr(), chunks="auto")
    resumed.chunking.resume(8)
    assert resumed.chunking.chunks is None and "8 parts, which do not divide over 3 ranks" in capsys.readouterr().err


def test_this_machine_has_free_memory() -> None:
    assert 2**20 < memory_probe.free_memory(CPU, 2) <= memory_probe.free_memory(CPU, 1)
