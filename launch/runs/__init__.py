"""Run folders, their history and their state; loads no torch."""
