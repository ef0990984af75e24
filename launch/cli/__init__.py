"""The work and the output of each command; above everything else in launch/."""
