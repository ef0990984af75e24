"""The agents of several machines: meeting, talking, ending together."""
