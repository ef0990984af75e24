"""One row of an overview of runs. Loads no torch."""

from typing import Literal

from pydantic import BaseModel

from kilobatch.launch.runs import run_folder
from kilobatch.launch.runs.job_history import Counts
from kilobatch.trainer.evaluate.baselines.baselines_file import Baselines
from kilobatch.trainer.monitor.progress_file import Note


class RunRow(BaseModel):
    """The present state of a run. Ages and eta are seconds; data_wait, knn, knn_sample and top1 are shares; None: not
    known, or does not apply.

    baselines: what knn is compared with or, where they are of a sample of the images, knn_sample; waiting: the
    scheduler's reason why a job is queued; notes: on how the training learns; nodes: their number; hosts: names of the
    nodes it runs on; seen: age of the last progress report; problem: what ended the last attempt, or what is wrong with
    the folder; rank, host, lines: of the worker that failed first, and its last lines. An age is None where this
    machine's clock is behind that of the machine which wrote.
    """

    run: str
    state: run_folder.Status | Literal["damaged"]
    sweep: str | None = None
    job: str | None = None
    waiting: str | None = None
    nodes: int = 1
    workers: int | None = None
    hosts: str | None = None
    epoch: float | None = None
    epochs: int | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    knn: float | None = None
    knn_sample: float | None = None
    baselines: Baselines | None = None
    top1: float | None = None
    notes: list[Note] = []
    images_per_second: float | None = None
    data_wait: float | None = None
    eta: float | None = None
    seen: float | None = None
    requeues: Counts = Counts()
    checkpoint_step: int | None = None
    checkpoint_age: float | None = None
    problem: str | None = None
    rank: int | None = None
    host: str | None = None
    lines: list[str] = []
