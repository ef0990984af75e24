"""Images to batches: sources, .beton writing, FFCV loading, order, views."""
