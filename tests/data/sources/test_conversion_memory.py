"""A conversion's memory grows by some bytes for each entry, whatever images these are: ten million fit anywhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.programs import PROGRAMS

MOST = 300  # bytes for each entry of a list: its path, its label, its row, its place and its checksum


@pytest.mark.slow
def test_a_million_entries_are_listed_and_converted_in_little_memory(tmp_path: Path):
    command = [sys.executable, str(PROGRAMS / "many_entries.py"), str(tmp_path), "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    found = re.match(r"opened (\d+) converted (\d+) bytes", done.stdout)
    assert found and int(found[1]) < int(found[2]) < MOST, done.stdout
