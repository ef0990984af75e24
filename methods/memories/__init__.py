"""Memories that methods keep from step to step: momentum encoder, queue, memory bank."""
