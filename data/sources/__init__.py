"""Sources of images, and their conversion to .beton."""
