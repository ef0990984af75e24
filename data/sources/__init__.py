"""Where images come from, and their conversion to .beton."""
