"""The commands: what they do and print; above everything else in launch/."""
