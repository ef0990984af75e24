"""Makes batches ahead of their use, with FFCV's loader in a thread of its own."""

import atexit
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full
from typing import Any

import torch
from torch import Tensor

from kilobatch.data.beton import refuse_changed
from kilobatch.data.loading.decoders import BatchRequest, Labels, ViewDecoder
from kilobatch.data.loading.ffcv_bindings import Compiler, EpochIterator, FfcvLoader, PipelineSpec, keep_torch_threads
from kilobatch.data.loading.field_reader import FieldReader

AHEAD = 3  # finished batches in the queue


@dataclass(frozen=True)
class MadeBatch:
    """What a request came to, on the device. views: of each group (N, V, ...); label, index, names: (N,) int64;
    fields: (N, ...)."""

    views: tuple[Tensor, ...]
    label: Tensor
    index: Tensor
    names: Tensor
    fields: dict[str, Tensor]
    request: BatchRequest


class OpenBeton:
    """An open .beton and FFCV's pipeline over it. fields: those that are read beside images and labels. Raises
    UserError where the file lacks one."""

    def __init__(self, path: Path, images: ViewDecoder, device: torch.device, fields: Sequence[str] = ()):
        self.images, self.device, self.fields = images, device, tuple(fields)
        rows = images.info.rows
        pipelines: dict[str, Any] = dict.fromkeys(rows.fields)  # FFCV decodes each field that is not None here
        pipelines[rows.image] = PipelineSpec(rows.image, decoder=images)
        pipelines[rows.label] = PipelineSpec(rows.label, decoder=Labels(device))
        for name in fields:
            pipelines[name] = PipelineSpec(name, decoder=FieldReader(path, images.info, name, device))
        Compiler.set_enabled(False)  # the decoders call loops that are compiled already
        try:
            with keep_torch_threads():
                self.loader = FfcvLoader(
                    str(path),
                    batch_size=1,  # of FFCV's own order, which is not used: requests name a batch's samples
                    num_workers=1,  # the decoder has threads of its own
                    seed=0,
                    batches_ahead=AHEAD,
                    pipelines=pipelines,
                )
        finally:
            Compiler.set_enabled(True)
        self.outputs = list(self.loader.pipeline_specs)  # in the order of FFCV's results, which is the file's
        # FFCV has read the tables anew: the file may have been replaced since it was checked.
        read = self.loader.reader
        tables = read.field_descriptors, read.metadata, read.alloc_table
        refuse_changed(path, images.info, read.header.tobytes(), *(table.data for table in tables))

    @property
    def samples(self) -> int:
        return int(self.loader.reader.num_samples)


class Prefetcher(EpochIterator):
    """A thread that makes the batches of `requests` in order, at most AHEAD + 1 before they are taken.

    FFCV's own thread ends silently at an exception, and a process that waits for a batch waits for ever; this one hands
    the exception to the reader. It must be closed, or it runs until the interpreter exits.
    """

    def __init__(self, beton: OpenBeton, requests: Iterator[BatchRequest]):
        self.requests = requests
        self.device = beton.device
        self.outputs = beton.outputs
        self.rows, self.fields = beton.images.info.rows, beton.fields
        with torch.cuda.device(beton.device) if beton.device.type == "cuda" else nullcontext():
            super().__init__(beton.loader, [])
        atexit.register(self.close)  # a thread that still works while the interpreter shuts down crashes the process

    def run(self) -> None:
        slots = len(self.cuda_streams)
        try:
            for number, request in enumerate(self.requests):
                if not self.put((number % slots, self.run_pipeline(number, request, number % slots, None))):
                    return
            self.put(None)
        except BaseException as error:
            self.put(error)

    def put(self, item: object) -> bool:
        """Adds to the queue; False if the thread was told to end before there was room."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.1)
            except Full:
                continue
            return True
        return False

    def __next__(self) -> MadeBatch:
        item = self.next_item()
        if item is None:
            self.close()
            raise StopIteration
        if isinstance(item, BaseException):
            self.close()
            raise item
        slot, results = item
        by_name = dict(zip(self.outputs, results, strict=True))
        views, (label, index, names, request) = by_name[self.rows.image], by_name[self.rows.label]
        fields = {name: by_name[name] for name in self.fields}
        if self.device.type == "cuda":
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.cuda_streams[slot])
            for tensor in (*views, label, index, names, *fields.values()):
                tensor.record_stream(current)
        return MadeBatch(views, label, index, names, fields, request)

    def next_item(self) -> Any:
        while True:
            try:
                return self.output_queue.get(timeout=1.0)
            except Empty:
                if not self.is_alive() and self.output_queue.empty():
                    raise RuntimeError("the loader's thread has ended, and no batch is left") from None

    def close(self) -> None:
        """Ends the thread after the batch that it is making, and waits for that."""
        self.terminate_event.set()
        if self.is_alive():
            self.join()
        atexit.unregister(self.close)
        super().close()
