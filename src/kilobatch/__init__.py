"""kilobatch: contrastive image encoders at thousand-image batches."""
