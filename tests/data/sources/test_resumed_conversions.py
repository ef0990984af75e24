"""A conversion that was killed goes on: its files are those of one that nobody killed, and little is done twice."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kilobatch.data.sources import conversion_pass
from kilobatch.data.sources.arrays import Arrays
from kilobatch.data.sources.convert import convert
from kilobatch.data.sources.encoding import Encoding
from kilobatch.data.sources.image_files import EncodedImage
from tests.helpers.programs import PROGRAMS

RESUMED = PROGRAMS / "resumed_conversions.py"
AHEAD = 5 * conversion_pass.TASK_IMAGES  # of one thread: three tasks, one that it is at, and one being written
DONE = {
    "killed at 1": 0,
    "killed at 111": 111,
    "killed twice": 160,
    "samples damaged": 0,
    "journal cut": 111,
    "more in the files": 111,
    "names cut": 0,
    "other images": 0,
}


def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path: Path):
    done = subprocess.run([sys.executable, str(RESUMED), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines.keys() == DONE.keys()
    for name, most in DONE.items():
        found = re.fullmatch(r"(\d+) done(, same)?", lines[name])
        assert found and (found[2] or name == "other images"), (name, lines[name])
        assert max(0, most - AHEAD) <= int(found[1]) <= most, (name, lines[name])


def test_what_is_written_is_kept_where_the_user_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Stopping(Arrays):
        stopped = True

        def encode(self, i: int, encoding: Encoding) -> tuple[EncodedImage, int]:
            if self.stopped and i == 90:
                raise KeyboardInterrupt
            return super().encode(i, encoding)

    monkeypatch.setattr(conversion_pass, "EVERY", 0.0)
    source = Stopping(np.zeros((99, 8, 8), np.uint8), np.zeros(99, int), ["a"])
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "a.beton", progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.beton.partial", "a.beton.tmp"]
    source.stopped = False
    assert convert(source, tmp_path / "a.beton", progress=False).samples == 99
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.beton", "a.beton.json"]
