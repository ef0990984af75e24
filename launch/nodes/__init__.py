"""Agents of several machines, which connect, share events and end together."""
