"""Commands that print tables and lines, and change nothing."""
