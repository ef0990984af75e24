"""Groups of views: several sizes of one decoded image, each view as its number's key draws it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from kilobatch.data.beton_writer import write_samples
from kilobatch.data.loading.loader import input_images
from kilobatch.data.loading.preprocess import Preprocess
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import encode
from kilobatch.data.views.groups import ViewGroups, alike, groups_of, largest_side
from kilobatch.data.views.options import Affine, Blur, Crop, Operation, Photometric, Second, Solarize, Views
from kilobatch.data.views.photometric import Posterize
from tests.helpers.loaders import PLAIN, VIEWS, loader, photo

SMALL = Views(count=3, size=12, crop=Crop(scale=(0.05, 0.4)), interpolation="bicubic", blur=Blur(probability=1))
LARGE = Views(count=1, size=40, affine=Affine(degrees=30), second=None)
GROUPS = (VIEWS, SMALL, LARGE)  # the largest is the last: arrays to work in are made for it
OPERATIONS: tuple[Operation, ...] = ("crop", "flip", "affine", "jitter", "photometric", "grey", "blur", "solarize")


def epoch(beton: Path, views: ViewGroups, number: int = 0, first_step: int = 0, **options: int) -> list[list[Tensor]]:
    """The views of each group, batch by batch."""
    with loader(beton, views, **options) as made:
        return [[group.clone() for group in batch.views] for batch in made.epoch(number, first_step)]


@pytest.fixture(scope="module")
def whole(beton: Path) -> list[list[Tensor]]:
    return epoch(beton, GROUPS)


def test_a_view_is_what_its_number_draws(beton: Path, whole: list[list[Tensor]]) -> None:
    """The same as that of a single group which has as many views before it."""
    first, total = 0, sum(group.count for group in GROUPS)
    for number, group in enumerate(GROUPS):
        alone = group.model_copy(update={"count": total, "mean": VIEWS.mean, "std": VIEWS.std})
        expected = [batch[0][:, first : first + group.count] for batch in epoch(beton, alone)]
        made = [batch[number] for batch in whole]
        assert made[0].shape == (8, group.count, 3, group.size, group.size) and made[0].is_contiguous()
        assert torch.equal(torch.cat(made), torch.cat(expected))
        first += group.count


def test_the_first_group_alone_has_the_same_views(beton: Path, whole: list[list[Tensor]]) -> None:
    for batch, alone in zip(whole, epoch(beton, VIEWS), strict=True):
        assert torch.equal(batch[0], alone[0])


@pytest.mark.parametrize(("world", "threads"), [(1, 3), (2, 1), (4, 2)])
def test_ranks_and_threads_change_no_view(beton: Path, whole: list[list[Tensor]], world: int, threads: int) -> None:
    ranks = [epoch(beton, GROUPS, rank=rank, world=world, threads=threads) for rank in range(world)]
    for step, batch in enumerate(whole):
        for number, group in enumerate(batch):
            assert torch.equal(torch.cat([rank[step][number] for rank in ranks]), group)


def test_an_epoch_continued_in_its_middle(beton: Path, whole: list[list[Tensor]]) -> None:
    rest = epoch(beton, GROUPS, first_step=4)
    assert len(rest) == 2
    for batch, before in zip(rest, whole[4:], strict=True):
        assert all(torch.equal(group, other) for group, other in zip(batch, before, strict=True))


def test_batches_may_be_held(beton: Path, whole: list[list[Tensor]]) -> None:
    """Groups share one buffer, which is not used again while any of them is there."""
    with loader(beton, GROUPS) as made:
        held = [batch.views[1] for batch in made.epoch(0)]
        list(made.epoch(1))
    assert all(torch.equal(group, batch[1]) for group, batch in zip(held, whole, strict=True))


def by_bytes(beton: Path, views: ViewGroups) -> list[Tensor]:
    """The first batch in the way that it takes on an accelerator, run on the CPU."""
    with loader(beton, views) as made:
        made.beton.images.planar = False
        return list(next(made.epoch(0)).views)


def test_the_accelerators_way_makes_the_same_views(beton: Path, whole: list[list[Tensor]]) -> None:
    made = by_bytes(beton, GROUPS)
    for group, expected, options in zip(made, whole[0], GROUPS, strict=True):
        apart = (group - expected).abs() * torch.tensor(options.std)[:, None, None] * 255
        assert group.shape == expected.shape and apart.mean((1, 2, 3, 4)).max() < 2


def tied(*operations: Operation, **changed: object) -> Views:
    """Three views of which these operations are tied, with each operation half of the time."""
    photometric = Photometric(probability=0.5, posterize=Posterize(probability=0.5), equalize=0.5)
    options = {
        "affine": Affine(probability=0.5, degrees=30, shift=0.1),
        "photometric": photometric,
        "blur": Blur(kernel=5),
        "solarize": Solarize(probability=0.5, threshold=(0, 256)),
        "grey": 0.5,
    }
    return Views(count=3, size=16, ties=operations, **{**options, **changed})  # pyright: ignore[reportArgumentType]


def same(views: Tensor) -> bool:
    return torch.equal(views[:, :1].expand_as(views), views)


@pytest.mark.parametrize("form", [by_bytes, lambda *given: epoch(*given)[0]], ids=["batched", "planar"])
def test_ties_draw_once_for_all_views(beton: Path, form) -> None:
    assert same(form(beton, tied(*OPERATIONS))[0])
    only = {"crop": None, "flip": 0.0, "affine": None, "photometric": None, "jitter": None, "grey": 0.0, "blur": None}
    only |= {"solarize": None}
    for operation in OPERATIONS:
        others: list[Operation] = [other for other in OPERATIONS if other != operation]
        free, bound = (form(beton, tied(*operations))[0] for operations in (others, OPERATIONS))
        assert not same(free) and torch.equal(free[:, 0], bound[:, 0]), operation  # the first draws by its own key
        default = tied().model_dump(include={operation})[operation] if operation != "flip" else 0.5
        alone = Views.model_validate({"count": 3, "size": 16, "ties": [operation], **only, operation: default})
        assert same(form(beton, alone)[0]), operation
        assert not same(form(beton, alone.model_copy(update={"ties": ()}))[0]), operation


def test_ties_of_a_later_group_are_to_its_own_first_view(beton: Path) -> None:
    first, second = tied(), tied(*OPERATIONS)
    both = epoch(beton, (first, second))[0]
    alone = epoch(beton, first.model_copy(update={"count": 6}))[0][0]
    assert torch.equal(both[0], alone[:, :3]) and same(both[1]) and torch.equal(both[1][:, 0], alone[:, 3])


def test_what_pillow_has_to_read_lies_where_it_belongs(tmp_path: Path) -> None:
    """libjpeg warns of the middle image of three, of which Pillow then reads the pixels."""
    stored = encode(photo(0, 80, 80), Encoding())
    marker = stored.data.index(b"\xff\xc0")
    damaged = stored.data[:marker] + b"\x00\x00" + stored.data[marker:]
    path, files = tmp_path / "warning.beton", (stored.data, damaged, stored.data)
    write_samples(path, [(0, 80, 80, file, 0) for file in files], ["a"])
    groups = (Views(count=2, size=16, **PLAIN), Views(count=3, size=8, **PLAIN))
    for group in epoch(path, groups, batch=3)[0]:
        middle = group.flatten(0, 1).mean(0)
        assert (group - middle).abs().mean() < 1 / 255


def test_images_are_prepared_by_the_first_group_and_stored_for_the_largest() -> None:
    groups, image = (Views(size=32), Views(size=320)), np.asarray(photo(1, 900, 700))
    small, alone = Preprocess(groups), Preprocess(groups[0])
    assert largest_side(groups) == 320 and input_images(groups) == input_images(groups[0])
    apart = (small(image) - alone(image)).abs()  # of an image that is stored larger
    assert apart.shape == (3, 32, 32) and 0 < apart.mean() < 0.1
    assert torch.equal(Preprocess([groups[1], groups[0]])(image), Preprocess(groups[1])(image))


def test_later_groups_are_normalised_as_the_first() -> None:
    black = Views(mean=(0, 0, 0), std=(1, 1, 1))
    found = groups_of([black, Views(size=96), black])
    assert {(group.mean, group.std) for group in found} == {(black.mean, black.std)} and found[1].size == 96
    assert groups_of(found) == found and groups_of(black) == (black,)


@pytest.mark.parametrize(
    ("groups", "says"),
    [
        ([], "there is no group of views; give one at least"),
        ([Views(), Views(std=(0.5, 0.5, 0.5))], r"std of group 1 is \[0.5, .* all groups are normalised alike: leave"),
        ([Views(size=96), Views(size=96, second=Second(by_patch=True))], "group 1 has second.by_patch, whose jigsaw"),
        ([Views(count=64)] * 5, "the groups have 320 views of an image together; use at most 256"),
    ],
)
def test_groups_that_do_not_go_together_are_refused(groups: list[Views], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        alike(groups)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"count": 1, "ties": ("flip",)}, "ties says what the views have in common, and count is 1; use"),
        ({"size": 96, "second": Second(by_patch=True), "ties": ("flip",)}, "ties has no meaning with second.by_patch"),
    ],
)
def test_ties_without_a_meaning_are_refused(options: dict, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Views(**options)
