"""Garbage collection begins once a worker has imported and built what it needs, and leaves that alone."""

import gc
import subprocess
import sys
from pathlib import Path

from kilobatch.trainer.ranks.garbage import collect_from_now_on

# A launcher's module, which is imported with the collection off.
MODULE = """
import gc
from kilobatch.trainer.ranks.garbage import collect_from_now_on

off, built = not gc.isenabled(), [[k] for k in range(1000)]
collect_from_now_on()
left_alone = gc.get_freeze_count()
collect_from_now_on()
print(off, gc.isenabled(), left_alone > 1000, gc.get_freeze_count() <= left_alone)
"""


def test_a_workers_garbage(tmp_path: Path):
    (tmp_path / "scripted_module.py").write_text(MODULE)
    start = "import os, sys; from kilobatch.launch.processes import parent_death; "
    start += "sys.path.insert(0, sys.argv.pop(1)); sys.argv.insert(1, str(os.getppid())); parent_death.main()"
    done = subprocess.run([sys.executable, "-c", start, tmp_path, "scripted_module"], capture_output=True, text=True)
    assert done.stdout == "True True True True\n", done.stderr


def test_a_process_that_collects_already_is_left_as_it_is():
    before = gc.get_freeze_count()
    collect_from_now_on()
    assert gc.isenabled() and gc.get_freeze_count() <= before
