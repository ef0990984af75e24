"""Records of a run as they were before a command changed them, to be put back where it is refused. Loads no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kilobatch.data.errors import UserError
from kilobatch.data.files import read_record, write_state
from kilobatch.launch.runs import earlier_checkpoint, final_evaluation, identity
from kilobatch.launch.schedulers.scheduler import NoAnswer

FILES = ("cancelled", "cluster.yaml", "job.json", "state.json", "recipe.yaml", identity.FILE)


class FormerRecords:
    """The records of a run as they are now. Raises UserError where one of them cannot be read."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._files = {path: _content(path) for path in (*(run / name for name in FILES), *_evaluations(run))}
        self._aside: Path | None = None

    def set_newer_aside(self, step: int) -> Path | None:
        """Sets the checkpoints after a step aside, as earlier_checkpoint does."""
        self._aside = earlier_checkpoint.set_newer_aside(self._run, step)
        return self._aside

    def put_back(self) -> bool:
        """Puts all back. Returns whether the run's recipe, record or checkpoints had changed. Raises UserError where a
        file cannot be written."""
        changed = {path for path, content in self._files.items() if _content(path) != content}
        for path in changed:
            if (content := self._files[path]) is None:
                path.unlink()
            else:
                write_state(path, content)
        for path in _evaluations(self._run):
            if path not in self._files:
                path.unlink()
        if self._aside is not None:
            earlier_checkpoint.bring_back(self._run, self._aside)
        return self._aside is not None or any(path.name in ("recipe.yaml", identity.FILE) for path in changed)


@contextmanager
def put_back_if_refused(former: FormerRecords) -> Iterator[None]:
    """Puts the records back where the context raises a refusal. A scheduler's missing answer is none: what was asked
    for may come, and needs what was written."""
    try:
        yield
    except NoAnswer:
        raise
    except (UserError, OSError):
        former.put_back()
        raise


def _evaluations(run: Path) -> list[Path]:
    return [run / final_evaluation.FILE, *run.glob(final_evaluation.FORMER.format("*"))]


def _content(path: Path) -> bytes | None:
    try:
        return read_record(path)
    except FileNotFoundError:
        return None
