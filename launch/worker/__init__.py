"""The program of one worker (rank)."""
