"""Images: their sources, loading and augmentation. Every other folder may import this one."""
