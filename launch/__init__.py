"""Machines: command line, recipes read and validated, processes, run folders."""
