"""The process of one rank: its heartbeat, its quick start, and process groups for checks."""
