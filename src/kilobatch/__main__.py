"""Runs the command line as `python -m kilobatch`."""

import sys

if not sys.flags.safe_path:
    # The folder that the command is called in, where a random.py or yaml.py of the caller's own may be.
    del sys.path[0]

from kilobatch.launch.__main__ import main  # noqa: E402

main()
