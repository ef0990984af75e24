"""A batch is cut alike in all its tensors, and a clock counts in epochs and shares."""

import numpy as np
import torch

from kilobatch.data.batch import Batch, Clock, blank, make_batch
from kilobatch.data.beton_layout import ArrayForm
from kilobatch.data.sources.npz import NUMBERS
from kilobatch.data.views.options import Views


def whole() -> Batch:
    views = torch.randn(12, 2, 3, 8, 8), torch.randn(12, 3, 3, 4, 4)
    return make_batch(views, fields={"tokens": torch.arange(60).view(12, 5)}, clock=Clock(6, 20, 4))


def test_chunks_in_order_are_the_batch():
    batch = whole()
    parts = batch.chunks(3)
    assert [len(part) for part in parts] == [4, 4, 4] and all(part.clock == batch.clock for part in parts)
    for group in range(2):
        assert torch.equal(torch.cat([part.views[group] for part in parts]), batch.views[group])
    for name in ("index", "label", "keys"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    assert torch.equal(torch.cat([part.fields["tokens"] for part in parts]), batch.fields["tokens"])
    assert torch.equal(batch.first(5).views[1], batch.views[1][:5]) and len(batch.first(5)) == 5


def test_keys_come_from_step_and_sample_alone():
    batch = whole()
    assert len({*batch.keys.tolist()}) == 12
    assert torch.equal(make_batch(batch.views[0][3:5], torch.tensor([3, 4]), clock=batch.clock).keys, batch.keys[3:5])
    assert not torch.equal(make_batch(batch.views[0], clock=Clock(7, 20, 4)).keys, batch.keys)


def test_a_batch_without_images_has_its_fields_length():
    batch = make_batch((), fields={"tokens": torch.zeros(6, 5)})
    assert len(batch) == 6 and batch.views == () and batch.label.tolist() == [-1] * 6


def test_fields_are_added_beside_those_that_there_are():
    batch = whole()
    assert {*batch.with_fields(partner=batch.index).fields} == {"tokens", "partner"} and {*batch.fields} == {"tokens"}
    halves = batch.to(torch.float64)
    assert {x.dtype for x in halves.views} == {torch.float64} and halves.index.dtype == torch.int64


def test_a_blank_batch_has_the_shapes_of_its_options():
    groups = [Views(count=2, size=16), Views(count=6, size=8)]
    forms = [ArrayForm(name, np.dtype(name).newbyteorder("<"), (5, 7)) for name in NUMBERS]
    batch = blank(3, groups, [*forms, ArrayForm("count", np.dtype("int32"), ())])
    assert [tuple(x.shape) for x in batch.views] == [(3, 2, 3, 16, 16), (3, 6, 3, 8, 8)]
    assert batch.fields["count"].shape == (3,) and batch.clock.after == 0.5
    for name in NUMBERS:
        read = torch.from_numpy(np.zeros((3, 5, 7), name))  # as the loader makes a field
        assert (batch.fields[name].shape, batch.fields[name].dtype) == (read.shape, read.dtype)
    assert blank(3, groups).fields == {}


def test_a_clock_counts_what_is_done():
    clock = Clock(6, 20, 4)
    assert (clock.epoch, clock.progress, clock.after) == (1.5, 0.3, 0.35)
