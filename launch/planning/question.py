"""Asks in a process of its own whether a run's step fits into this machine's memory, while the workers start. Loads no
torch."""

import os
import signal
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from kilobatch.data.errors import warn
from kilobatch.data.files import describe_bytes
from kilobatch.data.views.groups import pixels_of_views
from kilobatch.launch.planning.answer import Answer, Request
from kilobatch.launch.processes import parent_death
from kilobatch.launch.processes.exit_status import RunOutcome
from kilobatch.launch.processes.import_path import import_variables
from kilobatch.launch.recipes.data import PreparedData
from kilobatch.launch.recipes.recipe import Recipe
from kilobatch.launch.recipes.references import references
from kilobatch.launch.runs.final_evaluation import training_finished
from kilobatch.launch.runs.job_history import last_line, last_step
from kilobatch.trainer.checkpoint.description import list_checkpoints
from kilobatch.trainer.costs import machine_memory

ADVICE_SECONDS = 120.0  # for the answer about a run that was killed
# A step of the small encoder, convnet, needs at most these bytes, and so many times the bytes of a rank's views. So the
# workers of digits and their like need not share the cores with a question while they start.
SMALL_STEP = 2**30, 300


class Question:
    """A run's step and this machine's memory.

    workers: of each machine; other_nodes: more nodes can be had; anyway: the run is meant even if it cannot fit, so
    that the plan is asked only once a worker was killed. refused: the answer was no, and its message was taken.
    """

    def __init__(
        self, folder: Path, recipe: Recipe, workers: int, nodes: int = 1, *, other_nodes: bool = False, anyway: bool
    ) -> None:
        self.refused = False
        self._folder, self._recipe, self._anyway = folder, recipe, anyway
        self._request = Request(workers=workers, nodes=nodes, has=0, other_nodes=other_nodes)
        self._data: PreparedData | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._answer: Answer | None = None

    def ask(self, data: PreparedData) -> None:
        """Begins to ask; before the workers start, as the memory that is free now is theirs. Workers that only evaluate
        are not asked about."""
        if self._trained():
            return
        has = machine_memory.most_per_worker(self._request.workers)
        self._data, self._request = data, self._request.model_copy(update={"has": has})
        # What torch.compile saves is not counted.
        if not (self._anyway or self._recipe.engine.compile or is_small(self._recipe, self._request)):
            self._start(self._request)

    def cannot_fit(self) -> bool:
        self._read()
        return self._answer is not None and not self._answer.fits

    def refusal(self) -> str | None:
        running = self._read()
        assert self._answer is not None
        if self._answer.way_out is None and running:
            return None
        return self._refusal(self._answer)

    def _refusal(self, answer: Answer, seen: str = "") -> str:
        """seen: what a worker met meanwhile, as a clause."""
        self.refused = True
        way_out = f"{answer.way_out}, or " if answer.way_out else ""
        return f"kilobatch: {answer.describe(self._request.workers)}{seen}; {way_out}--anyway if you mean it"

    def explain(self, outcome: RunOutcome) -> RunOutcome:
        """The outcome, where a worker ended for want of memory with what the plan says of that. It is a refusal where
        the worker was quicker than the answer no."""
        self.close()
        if not outcome.short_of_memory or self._recipe.engine.compile or self._data is None or self._trained():
            return outcome
        self._answer = None
        self._start(self._request.model_copy(update={"killed": True}))
        until = time.monotonic() + ADVICE_SECONDS
        while self._read() and time.monotonic() < until:
            time.sleep(0.1)
        self.close()
        if self._answer is None:
            return outcome
        if not (self._answer.fits or self._anyway or last_step(self._folder)):
            lines = self._refusal(self._answer, f" (rank {outcome.rank}: {outcome.how})").splitlines()
            return RunOutcome("refused", None, outcome.host, "refused", lines)
        way_out = f"; {self._answer.way_out}" if self._answer.way_out else ""
        plan = f"kilobatch plan says {describe_bytes(self._answer.needs)} a worker"
        return replace(outcome, how=f"{outcome.how}; {plan}{way_out}")

    def close(self) -> None:
        """Ends the process that answers."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _trained(self) -> bool:
        return training_finished(self._folder, self._recipe.schedule.epochs)

    def _start(self, request: Request) -> None:
        assert self._data is not None
        request = request.model_copy(update={"goes_on": bool(list_checkpoints(self._folder / "checkpoints"))})
        self._written, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        module = "kilobatch.launch.planning.answer"
        arguments = [str(self._folder), request.model_dump_json(), self._data.model_dump_json()]
        self._process = subprocess.Popen(
            parent_death.command(module, *arguments),
            env=os.environ | import_variables() | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._written,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C reaches only the launcher
        )

    def _read(self) -> bool:
        """Reads what has been answered so far. Returns whether more may come."""
        if self._process is None:
            return False
        code = self._process.poll()
        written = os.pread(self._written.fileno(), 1 << 20, 0)  # leaves the offset at which the process writes
        for line in written.splitlines(keepends=True)[-2:]:
            if line.endswith(b"\n"):
                self._answer = Answer.model_validate_json(line)
        if code is None:
            return True
        self._process = None
        if code not in (0, -signal.SIGKILL):  # by the kernel, which is to take this process before a worker
            reason = last_line(os.pread(self._errors.fileno(), 1 << 20, 0).decode(errors="replace").splitlines())
            warn(f"it was not found out whether the run fits into memory, by an error of the plan: {reason}")
        return False


def is_small(recipe: Recipe, request: Request) -> bool:
    """Whether a step needs so little that it need not be asked about: one of the small encoder alone, on small
    images."""
    samples = recipe.data.batch // (request.workers * request.nodes)
    size = SMALL_STEP[0] + SMALL_STEP[1] * 4 * samples * 3 * pixels_of_views(recipe.data.groups)
    small = recipe.encoder.name == "convnet" and (recipe.encoder.width or 16) <= 16 and not references(recipe)
    return small and size <= request.has
