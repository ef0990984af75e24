"""Runs the command line as `python -m kilobatch`."""

from kilobatch.launch.__main__ import main

main()
