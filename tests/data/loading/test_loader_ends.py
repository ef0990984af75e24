"""The ends of loaders: damaged files are refused by name, threads end, errors come through."""

import subprocess
import sys
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from kilobatch.data.beton_note import note_path
from kilobatch.data.beton_writer import write_samples
from kilobatch.data.errors import UserError
from kilobatch.data.loading.decoders import BatchRequest, ViewDecoder
from kilobatch.data.loading.prefetch import OpenBeton, Prefetcher
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import encode
from tests.helpers.loaders import (
    CPU,
    SAMPLES,
    VIEWS,
    Epochs,
    loader,
    photo,
    plain,
    stacked,
    threads_of_loaders,
    write,
)


def damaged(beton: Path, tmp_path: Path, keep: float) -> Path:
    """A copy in which the JPEG of sample 40 is zeros after this fraction of it."""
    copy = tmp_path / "damaged.beton"
    note_path(copy).write_bytes(note_path(beton).read_bytes())
    data = bytearray(beton.read_bytes())
    begin = [i for i in range(len(data) - 1) if data[i : i + 3] == b"\xff\xd8\xff"]
    stored = [i for i in range(SAMPLES) if max(40 + 7 * i % 60, 40 + 11 * i % 60) > 64]
    start, end = begin[stored.index(40)], begin[stored.index(40) + 1]
    cut_at = start + int(keep * (end - start))
    data[cut_at:end] = bytes(end - cut_at)
    copy.write_bytes(data)
    return copy


@pytest.mark.parametrize("keep", [0.0, 0.3])
def test_a_damaged_jpeg_is_refused_by_name(beton: Path, tmp_path: Path, keep: float):
    path = damaged(beton, tmp_path, keep)
    with pytest.raises(UserError, match=r"damaged.beton is damaged: the bytes of sample 40 have changed.*copy it"):
        list(plain(path))
    with loader(path, threads=2) as one, pytest.raises(UserError, match="sample 40"):
        for epoch in range(3):
            list(one.epoch(epoch))
    assert threads_of_loaders() == []


def test_a_jpeg_that_was_damaged_before_it_was_stored_is_refused_by_name(tmp_path: Path):
    stored = encode(photo(0, 80, 80), Encoding()).data
    path = tmp_path / "broken.beton"
    write_samples(path, [(0, 80, 80, data, 0) for data in (stored, stored[:200])], ["a"])
    with pytest.raises(UserError, match=r"broken.beton, sample 1: .*the file is damaged: convert it again"):
        list(plain(path))


def test_a_jpeg_that_only_draws_a_warning_is_shown(tmp_path: Path):
    image = photo(0, 80, 80)
    stored = encode(image, Encoding())
    marker = stored.data.index(b"\xff\xc0")
    path = tmp_path / "warning.beton"
    write_samples(path, [(0, 80, 80, stored.data[:marker] + b"\x00\x00" + stored.data[marker:], 0)], ["a"])
    clean = write(tmp_path / "clean.beton", [image])
    with pytest.raises(AssertionError):  # libjpeg warns ...
        decode_without_pillow(path)
    shown, expected = (next(iter(plain(p, size=24))).views[0] for p in (path, clean))
    assert (shown - expected).abs().mean() < 1 / 255  # ... and Pillow reads it


def decode_without_pillow(path: Path) -> None:
    images = ViewDecoder(path, VIEWS, 0, 0, 1, CPU)

    def fail(*_: object) -> None:
        raise AssertionError

    setattr(images, "decode_with_pillow", fail)  # noqa: B010
    next(Prefetcher(OpenBeton(path, images, CPU), iter([BatchRequest(0, 0, np.arange(1), np.arange(1))])))


def test_a_file_that_is_replaced_between_its_check_and_its_reading_is_refused(beton: Path, tmp_path: Path):
    path = tmp_path / "replaced.beton"
    for copy, original in ((path, beton), (note_path(path), note_path(beton))):
        copy.write_bytes(original.read_bytes())
    images = ViewDecoder(path, VIEWS, 0, 0, 1, CPU)
    write(path, [photo(i, 40, 40) for i in range(SAMPLES)])
    with pytest.raises(UserError, match="replaced.beton is damaged: its header, fields, rows or allocation table have"):
        OpenBeton(path, images, CPU)


def test_a_file_whose_tables_contradict_each_other_is_refused(tmp_path: Path):
    path = tmp_path / "wrong.beton"
    write_samples(path, [(1, 8, 8, bytes(3 * 8 * 7), 0)], ["a"])  # pixels of fewer rows than it says
    with pytest.raises(UserError, match="wrong.beton is damaged: its tables do not fit"):
        list(plain(path))


def test_a_batch_that_does_not_divide_is_refused(beton: Path):
    with pytest.raises(UserError, match="global batch 10 does not divide over 4 ranks; use 8 or 12"):
        loader(beton, batch=10, world=4)
    with pytest.raises(UserError, match="global batch 2 does not divide over 4 ranks; use 4"):
        loader(beton, batch=2, world=4)


def test_a_dataset_smaller_than_a_batch_is_refused(beton: Path):
    with pytest.raises(UserError, match="50 samples, fewer than one global batch of 64; set data.batch to at most 48"):
        loader(beton, batch=64, world=4)


def test_a_process_that_fails_in_an_epoch_ends_with_its_own_error(beton: Path):
    code = f"""
import torch
from pathlib import Path
from kilobatch.data.loading.loader import Loader, LoaderWorker
from kilobatch.data.views.options import Views
worker = LoaderWorker(rank=0, world=1, threads=2, device=torch.device("cpu"))
loader = Loader(Path({str(beton)!r}), Views(size=24), worker, batch=8, seed=0)
next(loader.epoch(0))
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 7


def test_leaving_an_epoch_early_leaves_one_thread_and_closing_none(beton: Path, reference: Epochs):
    assert threads_of_loaders() == []
    one = loader(beton)
    for _ in range(3):
        for batch in islice(one.epoch(0), 2):
            assert batch.views[0].isfinite().all()
    assert len(threads_of_loaders()) == 1
    rest = list(one.epoch(0, 2))  # goes on where it was left
    assert torch.equal(stacked(rest)[0], stacked(reference.batches[0][2:])[0])
    one.close()
    assert threads_of_loaders() == []
    for _ in plain(beton):
        break
    assert threads_of_loaders() == []


def test_the_iterator_of_an_epoch_that_was_left_raises(beton: Path):
    with loader(beton) as one:
        old = one.epoch(0)
        next(old)
        next(one.epoch(1))
        with pytest.raises(RuntimeError, match="epoch 0 of this loader has been left"):
            next(old)


def test_torch_keeps_its_threads(beton: Path):
    before = torch.get_num_threads()
    with loader(beton, threads=2) as one:
        next(one.epoch(0))
        assert torch.get_num_threads() == before
        counts: list[int] = []
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert counts == [before]


def test_importing_the_loader_keeps_torchs_threads():
    code = (
        "import torch; torch.set_num_threads(2); "
        "import kilobatch.data.loading.prefetch; assert torch.get_num_threads() == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
