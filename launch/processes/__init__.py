"""Starts, supervises and ends the worker processes of one machine."""
