"""Tells by its last lines whether a worker failed because of another one: it lost that one, or waited for it in vain.

The lines are those that gloo, NCCL, their watchdog and the store write.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

LAST_LINES = 20
Victim = Literal["timed out", "lost a peer"]
_SIGNS: dict[Victim, tuple[str, ...]] = {
    "timed out": (
        "Watchdog caught collective operation timeout",
        "watchdog detected operation timeout",
        "collective operation timed out",
        "timed out in blocking wait",
        "watchdog got stuck for",  # it waits in a call of NCCL's for the others
        "dump signal due to a collective timeout",
        "flight recorder dump signal from another rank",
        "for recv operation to complete",
        "for send operation to complete",
        "Application timeout caused pair closure",
        "wait timeout after",
        "waiting for clients",
    ),
    "lost a peer": (
        "Connection closed by peer",
        "Connection closed by remote peer",
        "Connection reset",
        "Connection refused",
        "Broken pipe",
        "Connection was likely closed",
        "remote process",
        "ncclRemoteError",
        "NCCL communicator was aborted",
        "remote error detected from rank",
        "Got completion from peer",
    ),
}
# Errors of the worker's own device, which NCCL's watchdog may be the first to tell.
_OWN = ("CUDA error", "CUDA out of memory")
_RANK = re.compile(r"\[rank\d+\]: ?(?!\[)")  # torch writes it before each line of a traceback
_NATIVE_LOG = re.compile(r"(\[rank\d+\]:)?\[[IWEF]\d* |terminate called after")
_STACK = re.compile(r'frame #\d+: |Exception raised from |  File "|    |(Current thread|Thread) 0x|Extension modules: ')
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_OPERATION = re.compile(r"SeqNum=(\d+), OpType=(\w+)")
_LIMIT = re.compile(r"Timeout\(ms\)=(\d+)|Timed out waiting (\d+)ms|timed out after (\d+)ms|wait timeout after (\d+)ms")
_DONE = re.compile(r"\[PG (?:ID )?(\d+)\b.*[Ll]ast enqueued \D*(-?\d+).*last completed \D*(-?\d+)")


@dataclass(frozen=True)
class Timeout:
    """What a worker wrote of a collective that timed out, as far as it did.

    operation, number: of the collective; seconds: after which it timed out; group: the number of its process group;
    enqueued, completed: the numbers of the last collectives that this worker had begun, and had done.
    """

    operation: str | None
    number: int | None
    seconds: float | None
    group: int | None
    enqueued: int | None
    completed: int | None


def victim_of(lines: Sequence[str]) -> Victim | None:
    """How another worker brought this one down, by its last lines; None: it failed by itself, as far as they tell.

    The first line that explains it decides, so that a worker's own error is not hidden by what it lost afterwards.
    """
    for line in error_lines(lines):
        if any(sign in line for sign in _OWN):
            return None
        for victim, signs in _SIGNS.items():
            if any(sign in line for sign in signs):
                return victim
    return None


def error_lines(lines: Sequence[str]) -> list[str]:
    """The lines among the last that say what went wrong, without the lines of stacks.

    These are the message of the last traceback, or the first message where one error was raised while another was
    handled; all lines where there is no traceback.
    """
    last = [line for line in (_RANK.sub("", line, count=1) for line in lines) if not _STACK.match(line)][-LAST_LINES:]
    starts = [i for i, line in enumerate(last) if line.startswith(_TRACEBACK)]
    if not starts:
        return last
    first = starts.pop()
    while starts and any(line.startswith(_CHAINED) for line in last[starts[-1] : first]):
        first = starts.pop()
    message: list[str] = []
    for line in last[first + 1 :]:
        if not line or _NATIVE_LOG.match(line):
            break
        message.append(line)
    return message


def timeout_of(lines: Sequence[str]) -> Timeout:
    """What these lines say of a collective that timed out."""
    text = "\n".join(lines)
    operation, limit, done = (pattern.search(text) for pattern in (_OPERATION, _LIMIT, _DONE))
    milliseconds = next(filter(None, limit.groups())) if limit else None
    return Timeout(
        operation=operation[2] if operation else None,
        number=int(operation[1]) if operation else None,
        seconds=int(milliseconds) / 1000 if milliseconds else None,
        group=int(done[1]) if done else None,
        enqueued=int(done[2]) if done else None,
        completed=int(done[3]) if done else None,
    )


def describe_timeouts(timeouts: dict[int, Timeout]) -> tuple[str, int | None]:
    """Describes a collective that timed out, from what ranks wrote of it, and names the rank that the others waited
    for; None: the lines do not tell. NCCL counts the collectives of each process group."""
    first = next((timeout for timeout in timeouts.values() if timeout.operation), next(iter(timeouts.values())))
    what = f"a collective ({first.operation}, number {first.number})" if first.operation else "a collective"
    after = "" if first.seconds is None else f" after {_duration(first.seconds)}"
    counted = {
        rank: (timeout.enqueued, timeout.completed)
        for rank, timeout in timeouts.items()
        if timeout.enqueued is not None and timeout.completed is not None
    }
    behind = [rank for rank in counted if counted[rank] == min(counted.values())]
    one_group = len({timeout.group for timeout in timeouts.values()}) == 1
    if len(counted) == len(timeouts) and one_group and len(behind) == 1 < len(counted):
        here, elsewhere = counted[behind[0]], max(counted.values())
        progress = f"{here[0]} begun and {here[1]} done, elsewhere {elsewhere[0]} and {elsewhere[1]}"
        return f"{what} timed out{after}; rank {behind[0]}: the least far, with {progress}", behind[0]
    waited = ", ".join(str(rank) for rank in sorted(timeouts)[:8]) + (", …" if len(timeouts) > 8 else "")
    return f"{what} timed out{after}; rank{'s' * (len(timeouts) > 1)} {waited} waited in it", None


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 60 else f"{seconds:g} s"
