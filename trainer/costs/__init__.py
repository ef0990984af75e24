"""Counts bytes and seconds: of memory, of collectives, of ZeRO."""
