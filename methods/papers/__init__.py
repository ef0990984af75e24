"""One paper, one file: `method.name` is the file name."""
