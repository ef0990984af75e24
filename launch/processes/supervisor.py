"""One machine's workers, watched to their end, together with those of the run's other machines."""

import signal
import time
from collections.abc import Callable
from typing import Protocol

from kilobatch.launch.processes.events import (
    LAST_LINES,
    STOPS,
    Came,
    Done,
    Failed,
    Left,
    Lost,
    News,
    Over,
    Reached,
    Stalled,
    Stop,
    Together,
    Trouble,
    ending,
)
from kilobatch.launch.processes.exit_status import INTERRUPTED, REFUSED, Ending, this_host
from kilobatch.launch.processes.stall_timer import Silence
from kilobatch.launch.processes.worker_processes import Worker, Workers

GRACE = 5.0  # seconds between SIGTERM and SIGKILL for the workers that a failed one leaves behind
DUMP = 2.0  # seconds for the workers that hang to write their stacks
TICK = 0.2


class Board(Protocol):
    """Where agents put up their news for all. A lost agent is news by itself."""

    def post(self, news: News) -> None: ...

    def read(self) -> list[News]:
        """What has come since the last call, our own included, in the same order on every node."""
        ...


class Alone:
    """The board of a run on one machine."""

    def __init__(self) -> None:
        self._posted: list[News] = []

    def post(self, news: News) -> None:
        self._posted.append(news)

    def read(self) -> list[News]:
        posted, self._posted = self._posted, []
        return posted


class Watch:
    """node: which this is; asked: to stop, so far; stall_minutes: without a sign of life until the workers are taken to
    hang; gather: seconds after a failure in which others are listened to, since the news of the first may be late."""

    def __init__(
        self,
        board: Board,
        node: int,
        asked: Callable[[], Stop | None],
        stall_minutes: float | None,
        gather: float,
    ) -> None:
        self.board, self.node = board, node
        self.asked, self.stall_minutes, self.gather = asked, stall_minutes, gather
        self.news: list[News] = []
        self._posted = 0  # level of the last stop that was put up
        self._told = 0  # level of the last stop that the workers were told of
        self._stopped = False
        self._beats, self._silence = 0, Silence()

    def wait(self) -> None:
        """A moment, before there are workers."""
        time.sleep(TICK)
        self._listen(None)

    def come(self) -> set[int]:
        """The nodes whose agents are there, or have been."""
        return {0} | {one.node for one in self.news if isinstance(one, Came)}

    def met(self) -> Together | None:
        """Whether all agents have met, and nothing had ended the run before."""
        first = next((one for one in self.news if isinstance(one, Together | Trouble | Stop | Over)), None)
        return first if isinstance(first, Together) else None

    def over_before_it_began(self) -> bool:
        """The same on every node, since all see the same order."""
        return self.met() is None and any(isinstance(one, Trouble | Stop | Over) for one in self.news)

    def run(self, workers: Workers) -> Ending:
        """The same on every node."""
        while workers.alive and not self._trouble():
            self._look(workers)
        until = time.monotonic() + self.gather
        while workers.alive and time.monotonic() < until:
            self._look(workers)
        hung: list[Reached] = []
        if isinstance(self._trouble(), Stalled):
            hung = _stacks(workers)
        left = list(workers.alive)
        workers.end(grace=0.0 if hung else GRACE)
        for worker in left:
            if worker.process.returncode == REFUSED:  # it has met the same as the first
                self._note(worker)
        return self.conclude(self._stopped, hung)

    def conclude(self, stopped: bool, hung: list[Reached]) -> Ending:
        """This node's workers are gone: waits for the other nodes', and for node 0's last word."""
        self.board.post(Done(self.node, stopped, hung))
        said = False
        while True:
            self._listen(None)
            for one in self.news:
                if isinstance(one, Over):
                    return one.ending
            gone = {one.node for one in self.news if isinstance(one, Done | Lost)}
            if self.node == 0 and gone >= self.come() and not said:
                self.board.post(Over(ending(self.news)))
                said = True
            elif any(isinstance(one, Lost) and one.node == 0 for one in self.news):
                return ending(self.news)
            else:
                time.sleep(TICK)

    def _trouble(self) -> Trouble | None:
        return next((one for one in self.news if isinstance(one, Trouble)), None)

    def _look(self, workers: Workers) -> None:
        for worker in workers.wait(TICK):
            self._note(worker)
        self._listen(workers)
        beats = sum(worker.beats for worker in workers.all)
        if beats > self._beats:
            self._beats = beats
            self._silence.broken()
        elif self.stall_minutes is not None and self._silence.seconds() > 60 * self.stall_minutes:
            self._silence.broken()
            self.board.post(Stalled(this_host(), self.stall_minutes))

    def _listen(self, workers: Workers | None) -> None:
        """Passes a stop on, from here to all and from all to the workers."""
        if (stop := self.asked()) and stop.level > self._posted:
            self._posted = stop.level
            self.board.post(stop)
        new = self.board.read()
        self.news += new
        for one in new:
            if isinstance(one, Stop) and workers and one.level > self._told:
                self._told = one.level
                workers.signal(signal.SIGTERM if one.level == 1 else signal.SIGKILL)

    def _note(self, worker: Worker) -> None:
        """What the end of a worker means."""
        code = worker.process.returncode
        if code == 0:
            return
        killed = self._told > 1 and code == -signal.SIGKILL
        if code == INTERRUPTED:
            self._stopped = True
        elif killed or (self._told and code in STOPS):
            self._stopped = True
            self.board.post(Left(worker.rank))
        else:
            self.board.post(Failed(worker.rank, this_host(), code, list(worker.output.lines)))


def _stacks(workers: Workers) -> list[Reached]:
    """Has every worker write its stacks."""
    workers.signal(signal.SIGUSR1)
    until = time.monotonic() + DUMP
    while time.monotonic() < until:
        workers.wait(until - time.monotonic())
    return [_reached(worker) for worker in workers.alive]


def _reached(worker: Worker) -> Reached:
    """Its lines: the frames in which the main thread hangs. That is the last one dumped, its latest frames first."""
    lines = list(worker.output.lines)
    heads = [i for i, line in enumerate(lines) if line.endswith("(most recent call first):")]
    shown = lines[heads[-1] :][:LAST_LINES] if heads else lines[-LAST_LINES:]
    return Reached(worker.rank, this_host(), worker.pace, bool(heads), shown)
