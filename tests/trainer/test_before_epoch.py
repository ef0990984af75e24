"""Results of a method's hook before an epoch: the same on any ranks, once an epoch, and whole or not at all."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kilobatch.data.batch import Batch
from kilobatch.methods import collectives
from kilobatch.methods.method import EpochFeatures, Tensors
from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.checkpoint.options import CheckpointOptions
from kilobatch.trainer.checkpoint.reader import open_saved
from kilobatch.trainer.checkpoint.writer import Checkpoints
from kilobatch.trainer.training_features import TrainingFeatures
from tests.helpers.in_memory_data import Block
from tests.helpers.process_groups import run_ranks
from tests.helpers.toy_loop import PER_EPOCH, Steps, toy_loop
from tests.helpers.toy_method import Toy, sgd_engine

EPOCHS, SAMPLES = 3, 9  # samples: unequal blocks, of which one has a batch more
IMAGES = torch.randn(SAMPLES, 3, 6, 6, generator=torch.Generator().manual_seed(3))


class Centred(Toy):
    """Adds the distance of the embeddings to the mean of all samples' features, as they are before the epoch."""

    centre: Tensor
    seen: Tensor  # how often the hook has run; in the buffers, so that a second run of it is in what is compared

    rounds = 0  # of the work on the features, each of which may end it

    def __init__(self) -> None:
        super().__init__(dropout=0.3)
        self.register_buffer("centre", torch.zeros(8))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))
        self.epochs: list[int] = []

    def before_epoch(self, epoch: int, features: EpochFeatures) -> None:
        index, rows = features(lambda images: self.encoder(images))
        assert not rows.requires_grad and rows.dtype == torch.float32
        sums = collectives.all_reduce_sum((rows.double() * 2**20).round().long().sum(0))
        assert sorted(gathered(index)) == [*range(SAMPLES)]
        for self.rounds in range(1, 4):
            features.go_on("rounds", self.rounds, 3)
        self.epochs.append(epoch)
        self.centre.copy_(sums / SAMPLES / 2**20)
        self.seen += 1

    def loss(self, z: Tensors, t: Tensors, batch: Batch) -> Tensor:
        return super().loss(z, t, batch) + (z["z"] - self.centre).pow(2).mean()


def gathered(index: Tensor) -> list[int]:
    padded = torch.full((SAMPLES,), -1)
    padded[: len(index)] = index
    return [i for i in collectives.gather(padded).tolist() if i >= 0]


def trained(folder: Path, stop: Callable[[Steps, Centred], bool] = lambda steps, method: False) -> dict[str, Any]:
    """A training from the newest checkpoint on. stop: whether this rank has received a signal."""
    torch.manual_seed(0)
    method, steps = Centred(), Steps()
    engine = sgd_engine(method)
    with Checkpoints(folder, CheckpointOptions(keep_last=9), collectives.rank(), collectives.world_size()) as saving:
        asked = partial(stop, steps, method)
        features = TrainingFeatures(engine, lambda size: Block(IMAGES, torch.zeros(SAMPLES), 2), asked)
        loop = toy_loop(engine, saving, steps, EPOCHS, asked, features)
        saved = list_checkpoints(folder)
        finished = loop.run(loop.restore(open_saved(max(saved.values()))) if saved else 0)
    state = {name: x.clone() for name, x in method.state_dict().items()}
    ended = {"finished": finished, "steps": steps.taken, "epochs": method.epochs, "rounds": method.rounds}
    return {**ended, "state": state}


def scenarios(folder: Path) -> dict[str, Any]:
    last = collectives.rank() == collectives.world_size() - 1

    def in_the_hook(epoch: int) -> Callable[[Steps, Centred], bool]:
        """The signal comes to one rank in the second round of this epoch's features."""
        rounds = iter(range(100))

        def stop(steps: Steps, method: Centred) -> bool:
            inside = len(method.epochs) == epoch and len(steps.taken) == epoch * PER_EPOCH
            return inside and next(rounds) > 0 and last

        return stop

    def in_the_work(steps: Steps, method: Centred) -> bool:
        """The signal comes in the second round of what the method makes of the first features."""
        return last and not method.epochs and method.rounds == 2

    found = {"whole": trained(folder / "whole"), "stopped in the work": trained(folder / "work", in_the_work)}
    found["stopped at first"] = trained(folder / "hook", in_the_hook(0))
    found["stopped in the hook"] = trained(folder / "hook", in_the_hook(1))
    found["after the hook"] = trained(folder / "hook")
    found["stopped in an epoch"] = trained(folder / "epoch", lambda steps, method: last and len(steps.taken) > 4)
    found["after the epoch"] = trained(folder / "epoch")
    return found


@pytest.fixture(scope="module", params=[1, 2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    of_ranks = run_ranks(request.param, scenarios, tmp_path_factory.mktemp("runs"), timeout=240.0)
    for other in of_ranks[1:]:
        assert {name: of["steps"] for name, of in other.items()} == {n: of["steps"] for n, of in of_ranks[0].items()}
    return of_ranks[0]


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(x, other["state"][name]) for name, x in one["state"].items())


def test_the_hook_runs_once_an_epoch(found: dict[str, Any]) -> None:
    whole = found["whole"]
    assert (whole["finished"], whole["epochs"], int(whole["state"]["seen"])) == (True, [0, 1, 2], EPOCHS)
    assert whole["state"]["centre"].norm() > 0


def test_a_signal_in_the_hook_leaves_everything_as_it_was(found: dict[str, Any]) -> None:
    first, second, rest = (found[name] for name in ("stopped at first", "stopped in the hook", "after the hook"))
    assert (first["finished"], first["steps"], first["epochs"]) == (False, [], [])
    assert (second["finished"], second["steps"], second["epochs"]) == (False, [0, 1, 2], [0])
    assert (rest["finished"], rest["steps"], rest["epochs"]) == (True, [*range(3, 9)], [1, 2])
    assert same(rest, found["whole"])


def test_a_signal_ends_the_work_on_the_features(found: dict[str, Any]) -> None:
    ended = found["stopped in the work"]
    assert (ended["finished"], ended["steps"], ended["epochs"], ended["rounds"]) == (False, [], [], 2)
    assert found["whole"]["rounds"] == 3


def test_a_run_that_is_resumed_within_an_epoch_goes_on_with_its_results(found: dict[str, Any]) -> None:
    before, rest = found["stopped in an epoch"], found["after the epoch"]
    assert not before["finished"] and before["epochs"] == [0, 1] and before["steps"][-1] in (4, 5)
    assert rest["epochs"] == [2]
    assert same(rest, found["whole"]), "the hook has run again, or its results were lost"


def test_results_are_the_same_on_any_ranks(tmp_path: Path) -> None:
    whole = {ranks: run_ranks(ranks, first_centre, tmp_path / str(ranks))[0] for ranks in (1, 2, 4)}
    assert torch.equal(whole[1], whole[2]) and torch.equal(whole[1], whole[4])


def first_centre(folder: Path) -> Tensor:
    return trained(folder, lambda steps, method: len(steps.taken) > 0)["state"]["centre"]
