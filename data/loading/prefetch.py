"""Batches made ahead of their use, by FFCV's loader in a thread of its own."""

import atexit
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from queue import Empty, Full
from typing import Any

import torch
from torch import Tensor

from kilobatch.data.loading.decoders import CutViews, Labels, Work
from kilobatch.data.loading.ffcv_bindings import Compiler, EpochIterator, FfcvLoader, PipelineSpec, torch_threads_kept

AHEAD = 3  # finished batches that wait


class Beton:
    """An open .beton and FFCV's pipeline over it."""

    def __init__(self, path: Path, images: CutViews, device: torch.device):
        self.images, self.device = images, device
        pipelines: dict[str, Any] = {
            "image": PipelineSpec("image", decoder=images),
            "label": PipelineSpec("label", decoder=Labels(device)),
        }
        Compiler.set_enabled(False)  # our decoders call loops that are compiled already
        try:
            with torch_threads_kept():
                self.loader = FfcvLoader(
                    str(path),
                    batch_size=1,  # of its own order, which is not used: a stream says which samples make a batch
                    num_workers=1,  # the decoder has threads of its own
                    seed=0,
                    batches_ahead=AHEAD,
                    pipelines=pipelines,
                )
        finally:
            Compiler.set_enabled(True)

    @property
    def samples(self) -> int:
        return int(self.loader.reader.num_samples)


class Stream(EpochIterator):
    """A thread that makes the batches of `works` in order, at most AHEAD + 1 before they are asked for.

    FFCV's own thread dies silently of an exception, and whoever waits for a batch waits for ever; this one hands the
    exception over. Must be closed, or it stays until the interpreter's exit.
    """

    def __init__(self, beton: Beton, works: Iterator[Work]):
        self.works = works
        self.device = beton.device
        with torch.cuda.device(beton.device) if beton.device.type == "cuda" else nullcontext():
            super().__init__(beton.loader, [])
        atexit.register(self.close)  # a thread at work while the interpreter goes down crashes the process

    def run(self) -> None:
        slots = len(self.cuda_streams)
        try:
            for number, work in enumerate(self.works):
                if not self.put((number % slots, self.run_pipeline(number, work, number % slots, None))):
                    return
            self.put(None)
        except BaseException as error:
            self.put(error)

    def put(self, item: object) -> bool:
        """False if the stream was closed before there was room."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
            except Full:
                continue
            return True
        return False

    def __next__(self) -> tuple[Tensor, Tensor, Tensor, Work]:
        """views, labels, indices, and what was asked for."""
        item = self.take()
        if item is None:
            self.close()
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise item
        slot, (views, (labels, index, work)) = item
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.cuda_streams[slot])
            for tensor in (views, labels, index):
                tensor.record_stream(current)
        return views, labels, index, work

    def take(self) -> Any:
        while True:
            try:
                return self.output_queue.get(timeout=1.0)
            except Empty:
                if not self.is_alive() and self.output_queue.empty():
                    raise RuntimeError("the loader's thread has ended, and no batch is left") from None

    def close(self) -> None:
        """Ends the thread after the batch that it is at, and waits for that."""
        self.terminate_event.set()
        if self.is_alive():
            self.join()
        atexit.unregister(self.close)
        super().close()
