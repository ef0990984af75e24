"""What each command does and prints; above everything else in launch/."""
