"""The program of one worker, which is one rank of a run."""
