"""A rank's process: forked for checks, its heartbeat, its quick start."""
