"""Bytes and seconds: of memory, of collectives, of ZeRO."""
