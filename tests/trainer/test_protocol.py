"""A method that uses every place of the protocol: exact on ranks x chunks, and to the bit after a kill in any phase."""

import os
import signal
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.multiprocessing.spawn import ProcessExitedException

from kilobatch.data.batch import make_batch
from kilobatch.data.errors import UserError
from kilobatch.data.tensor_rng import sample_keys
from kilobatch.methods import collectives
from kilobatch.methods.partners import draw_partners
from kilobatch.trainer.checkpoint.description import list_checkpoints
from tests.helpers.process_groups import run_ranks
from tests.helpers.protocol_training import (
    Case,
    Killed,
    Point,
    contents,
    differing,
    largest_difference,
    points,
    train,
    write_beton,
)

CHUNKED = Case(zero=2, chunks=2, norm="local")


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beton(tmp_path_factory.mktemp("beton"))


# A phase of each kind; the others are among the slow tests.
QUICK = "in the hook", "at the order", "in the last embed", "after the optimizer", "before a checkpoint"


def killed_in(folder: Path, beton: Path, case: Case, phases: Collection[str]) -> dict[str, Any]:
    """Of each phase: how many steps were saved when it was killed, and what differs at the end of the resumed run."""
    whole, found = train(folder / "whole", beton, case), {}
    known = points(case, collectives.world_size())
    for number, phase in enumerate(phases or known):
        point = known[phase]
        run = folder / str(number)
        with pytest.raises(Killed):
            train(run, beton, case, point)
        found[phase] = max(list_checkpoints(run), default=0), differing(train(run, beton, case), whole)
    return found


SLOW = [
    (1, Case(0)),
    (1, Case(0, 4, "local")),
    (2, Case(1)),
    (2, CHUNKED),
    (3, Case(0, 2, "local")),
    (3, Case(2)),
    (4, Case(0)),
    (4, Case(1, 2, "local")),
    (4, Case(2, 3, "local")),
]


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(beton: Path, tmp_path: Path) -> None:
    found = run_ranks(2, killed_in, tmp_path, beton, CHUNKED, QUICK, timeout=400.0)[0]
    assert found == {phase: (6 if phase in ("in the hook", "at the order") else 4, []) for phase in QUICK}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("ranks", "case"), SLOW)
def test_a_run_that_is_killed_in_any_phase_ends_as_if_it_had_not_been(
    ranks: int, case: Case, beton: Path, tmp_path: Path
) -> None:
    found = run_ranks(ranks, killed_in, tmp_path, beton, case, (), timeout=1500.0)[0]
    assert [phase for phase, (_, different) in found.items() if different] == []
    saved = {phase: steps for phase, (steps, _) in found.items()}
    assert saved.pop("before a checkpoint") == 4 and saved.pop("after a checkpoint") in (4, 6)
    assert saved.pop("in the hook of an epoch whose checkpoint is older") == 2
    last = {phase: saved.pop(phase) for phase in ("before the hook", "in the hook", "after the hook", "at the order")}
    assert set(last.values()) == {6} and set(saved.values()) == {4}, "it was killed elsewhere than the test says"


PATIENT = 500.0  # seconds: a training takes 20 on two idle cores, and 100 on busy ones
SIGNALLED = ["in the hook", "before the last backward", "after the optimizer", "after a checkpoint"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("phase", SIGNALLED)
def test_a_run_whose_ranks_are_killed_by_a_signal_goes_on_to_the_bit(phase: str, beton: Path, tmp_path: Path) -> None:
    ranks = 2
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(ranks, signalled, tmp_path / "killed", beton, CHUNKED, points(CHUNKED, ranks)[phase], timeout=PATIENT)
    for run in ("killed", "whole"):
        run_ranks(ranks, train, tmp_path / run, beton, CHUNKED, timeout=PATIENT)
    assert differing(contents(tmp_path / "killed"), contents(tmp_path / "whole")) == []


def signalled(folder: Path, beton: Path, case: Case, point: Point) -> None:
    train(folder, beton, case, point, lambda: os.kill(os.getpid(), signal.SIGKILL))


LAYOUTS = {  # the norm's statistics are those of the same samples in each row's runs
    "global": [(1, Case(0)), (2, Case(1)), (3, Case(2)), (4, Case(1))],
    "four parts": [(1, Case(0, 4, "local")), (2, Case(2, 2, "local")), (4, Case(1, 1, "local"))],
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_chunks_and_zero_stages_end_at_the_same_weights(name: str, beton: Path, tmp_path: Path) -> None:
    (_, first), *_ = LAYOUTS[name]
    ends = []
    for number, (ranks, case) in enumerate(LAYOUTS[name]):
        run_ranks(ranks, train, tmp_path / str(number), beton, case, timeout=PATIENT)
        ends.append(contents(tmp_path / str(number)))
    expected = ends[0]
    floats = [n for n, x in expected.items() if n.startswith("method.") and " of " not in n and x.is_floating_point()]
    integers = [n for n, x in expected.items() if n.startswith("method.") and " of " not in n and n not in floats]
    assert first.zero == 0 and any("cluster" in n for n in integers)
    for end in ends[1:]:
        assert all(torch.equal(end[n], expected[n]) for n in integers)
        assert largest_difference(end, expected, floats) < 1e-4


def test_partners_are_drawn_within_blocks() -> None:
    batch = make_batch(torch.zeros(24, 2, 3, 4, 4))
    partners = draw_partners(batch, 4).view(6, 4)
    assert [sorted(row) for row in (partners % 4).tolist()] == [[0, 1, 2, 3]] * 6
    assert torch.equal(partners // 4, torch.arange(6)[:, None].expand(6, 4))
    halves = [draw_partners(half, 4) for half in batch.chunks(2)]
    assert torch.equal(torch.cat([halves[0], halves[1] + 12]), partners.flatten())
    assert len({tuple(row) for row in (partners % 4).tolist()}) > 1, "blocks draw apart"
    later = batch.replaced(keys=sample_keys(0, 1, batch.index))
    assert not torch.equal(draw_partners(later, 4), partners.flatten()), "steps draw apart"


def test_blocks_that_do_not_divide_are_refused() -> None:
    batch = make_batch(torch.zeros(24, 2, 3, 4, 4))
    with pytest.raises(
        UserError, match="among 5 consecutive samples, which does not divide the 24 .* use a block of 4"
    ):
        draw_partners(batch, 5)
    with pytest.raises(UserError, match="use a block of 1,"):
        draw_partners(batch, 0)
