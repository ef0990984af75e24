"""Runs one worker of `kilobatch embed`: computes the features of its share of the parts that are missing.

`python -m kilobatch.launch.worker.embedding FOLDER WORK`
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch.distributed as dist
from torch import Tensor

from kilobatch.data.sources.progress_bar import progress_bar
from kilobatch.launch.processes.exit_status import INTERRUPTED
from kilobatch.launch.recipes.references import recipe_of
from kilobatch.launch.worker import flight_recorder
from kilobatch.launch.worker.components import clean_loader, refuse_missing_fields
from kilobatch.launch.worker.error_file import leave, recording_error
from kilobatch.launch.worker.pretrained import load_resolved
from kilobatch.launch.worker.process_group import World, group_timeout, world_from_environment
from kilobatch.methods import collectives
from kilobatch.trainer.checkpoint.feature_parts import EmbeddingWork
from kilobatch.trainer.evaluate.features import representing
from kilobatch.trainer.ranks.garbage import collect_from_now_on
from kilobatch.trainer.ranks.heartbeat import heartbeat
from kilobatch.trainer.ranks.skip_dynamo import skip_dynamo


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):  # what is finished is on disk
        signal.signal(number, lambda received, frame: os._exit(INTERRUPTED))
    skip_dynamo()
    folder, work = Path(sys.argv[1]), EmbeddingWork.model_validate_json(sys.argv[2])
    try:
        with recording_error():
            world = world_from_environment(work.device)
            flight_recorder.dump_on_request(world.rank)
            world.connect(group_timeout(work.stall_minutes))
            compute_missing(folder, work, world)
    except BaseException as error:
        leave(error)
    dist.destroy_process_group()


def compute_missing(folder: Path, work: EmbeddingWork, world: World) -> None:
    """Computes and writes the parts that are missing in the folder; all ranks call it together."""
    missing = collectives.from_rank_0(lambda: work.missing(folder))
    done = work.samples - sum(len(work.images(part)) for part in missing)
    with progress_bar(work.samples, work.out, world.rank == 0, "embedding", done) as advance:
        for images in _compute(folder, work, world, missing[world.rank :: world.size]):
            if world.rank == 0:
                now = work.count_done(folder, missing) + images
                advance(now - done)
                done = now
        if world.size > 1:
            dist.barrier()
        advance(work.samples - done)


def _compute(folder: Path, work: EmbeddingWork, world: World, parts: list[int]) -> Iterator[int]:
    """Computes and writes these parts. Yields, after each batch, the images of the part that is not written yet."""
    if not parts:
        return
    recipe = recipe_of(str(work.encoder))
    method = load_resolved(work.encoder).to(world.device)
    refuse_missing_fields(recipe, method, str(work.beton), work.beton)
    rows_of_parts = np.concatenate([work.images(part) for part in parts])
    loader = clean_loader(recipe, world, work.beton, batch=work.batch, rows=rows_of_parts)
    waiting, rows = iter(parts), list[Tensor]()
    part = next(waiting)
    collect_from_now_on()
    with representing(method) as represent:
        for batch in loader:
            rows.append(represent(batch).cpu())
            heartbeat()
            if sum(map(len, rows)) == len(work.images(part)):
                work.write(folder, part, np.concatenate([row.numpy() for row in rows]))
                rows.clear()
                part = next(waiting, part)
            yield sum(map(len, rows))


if __name__ == "__main__":
    main()
