"""Random draws of a view, and the options that set their ranges."""
