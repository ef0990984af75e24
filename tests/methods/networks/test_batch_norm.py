import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kilobatch.methods.networks import batch_norm
from kilobatch.methods.networks.batch_norm import BatchNorm
from kilobatch.methods.networks.options import Mode


def pair(dims: int) -> tuple[BatchNorm, nn.Module]:
    torch.manual_seed(0)
    ours, theirs = BatchNorm(6, "local"), (nn.BatchNorm1d if dims == 2 else nn.BatchNorm2d)(6)
    for p in theirs.parameters():
        nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict())  # the same keys, strictly
    return ours, theirs


def images(dims: int, n: int = 8) -> Tensor:
    return torch.randn(n, 6, *([5, 4] if dims == 4 else [])) * 3 + 2


@pytest.mark.parametrize("dims", [2, 4])
@pytest.mark.parametrize("mode", ["local", "global"])
def test_on_one_rank_it_equals_torchs_norm(dims: int, mode: Mode) -> None:
    ours, theirs = pair(dims)
    ours.mode = mode
    for _ in range(3):
        x = images(dims)
        assert_close(ours(x), theirs(x))
        batch_norm.commit(ours)
    assert_close(ours.state_dict(), theirs.state_dict())
    x = images(dims)
    assert_close(ours.eval()(x), theirs.eval()(x))


def test_running_statistics_move_once_a_step_by_the_average_over_forwards() -> None:
    ours, _ = pair(4)
    before = {name: x.clone() for name, x in ours.state_dict().items()}
    parts = [images(4), images(4)]
    for part in parts:
        ours(part)
    assert_close(ours.state_dict(), before, rtol=0, atol=0)
    with batch_norm.frozen(ours):
        ours(images(4) + 100)
    batch_norm.commit(ours)
    mean = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    var = torch.stack([part.transpose(0, 1).flatten(1).var(1) for part in parts]).mean(0)
    assert_close(ours.running_mean, 0.9 * before["running_mean"] + 0.1 * mean)
    assert_close(ours.running_var, 0.9 * before["running_var"] + 0.1 * var)
    assert ours.num_batches_tracked == 1
    after = {name: x.clone() for name, x in ours.state_dict().items()}
    batch_norm.commit(ours)  # nothing pending
    assert_close(ours.state_dict(), after, rtol=0, atol=0)


def test_frozen_ends_with_its_block_after_an_error_too() -> None:
    ours, _ = pair(2)
    with pytest.raises(KeyError), batch_norm.frozen(ours):
        raise KeyError
    ours(images(2))
    assert ours.pending_forwards == 1


def test_under_autocast_statistics_stay_fp32() -> None:
    ours, theirs = pair(4)
    x = images(4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ours(x)
    assert y.dtype == torch.bfloat16 and ours.pending_mean.dtype == torch.float32
    assert_close(ours.pending_mean, x.float().mean((0, 2, 3)))
    assert_close(y.float(), theirs(x.float()), rtol=0.02, atol=0.02)


def test_requires_whole_batch() -> None:
    assert batch_norm.requires_whole_batch(nn.Sequential(BatchNorm(2, "local"), BatchNorm(2, "global")))
    assert not batch_norm.requires_whole_batch(nn.Sequential(BatchNorm(2, "local"), nn.Linear(2, 2)))
