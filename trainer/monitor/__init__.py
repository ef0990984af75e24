"""Shows a run: metrics, progress, TensorBoard."""
